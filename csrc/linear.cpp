// Projections of few rows, several weights a call: bound by the time it takes to read the weights.
// The arithmetic is in linear_rows.h.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "abi.h"
#include "isa.h"
#include "parallel.h"

namespace swathe {
namespace {

constexpr int64_t kWeights = 4;
constexpr int64_t kMostRows = 16;   // of x, whose results are rounded and stored together
constexpr int64_t kColumns = 64;    // outputs, likewise
constexpr int64_t kTogether = 256;  // rows of x, for which int8 is widened once
constexpr int64_t kAhead = 8192;    // bytes of weights that are asked for before they are read

// One weight (N, K), rows with adjacent features, its bias (N,) or null, and its output (M, N).
// With `scales` (N,) the weight is int8, and a row's sum is multiplied by the row's scale.
struct Weights {
  const void *w, *bias;
  const float* scales;
  void* y;
  int64_t N, w_stride;
};

// Arguments as kernels/linear/_cpp.py packs them; every field takes 8 bytes.
struct LinearArguments {
  const void* x;
  int64_t type, M, K, x_stride, count, threads;
  Weights of[kWeights];
};

struct Linear : LinearArguments {
  int64_t width;  // floats from row to row of x once it is widened
  bool pairs;     // bf16 is multiplied as it is
};

struct LinearIsa {
  void (*widen)(const void*, float*, int64_t);
  void (*project)(const Linear&, int64_t, int64_t, const float*);
};

}  // namespace
}  // namespace swathe

#define SWATHE_BODY "linear_body.h"
#include "each_isa.h"

namespace swathe {
namespace {

// At most kTogether rows of x. Returns 0, or 1 without memory.
int32_t project_some(const Linear& a) {
  const LinearIsa& here = SWATHE_HERE(tables)[a.type];
  const int64_t size = a.type == kFloat32 ? 4 : 2;
  float* x = nullptr;
  if (!a.pairs) {
    x = scratch(a.M * a.width);
    if (x == nullptr) return 1;
    for (int64_t m = 0; m < a.M; ++m) {
      here.widen(static_cast<const char*>(a.x) + m * a.x_stride * size, x + m * a.width, a.K);
    }
  }
  int64_t columns = 0, bytes = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    columns += a.of[i].N;
    bytes += a.of[i].N * a.K * (a.of[i].scales == nullptr ? size : 1);
  }
  const int threads = threads_for(bytes, columns, static_cast<int>(a.threads));
  parallel_for(columns, threads,
               [&](int64_t begin, int64_t end) { here.project(a, begin, end, x); });
  return 0;
}

}  // namespace
}  // namespace swathe

using namespace swathe;

// Returns 0, or 1 without memory.
SWATHE_API int32_t swathe_linear(const void* packed) {
  Linear a = {};
  std::memcpy(static_cast<LinearArguments*>(&a), packed, sizeof(LinearArguments));
  const int64_t size = a.type == kFloat32 ? 4 : 2;
  a.width = (a.K + 15) / 16 * 16;
  a.pairs = a.type == kBFloat16 && isa() == kAvx512 && has_bf16_pairs();
  for (int64_t rows = a.M; rows > 0; rows -= a.M) {
    a.M = std::min(rows, kTogether);
    if (project_some(a)) return 1;
    a.x = static_cast<const char*>(a.x) + a.M * a.x_stride * size;
    for (int64_t i = 0; i < a.count; ++i) {
      a.of[i].y = static_cast<char*>(a.of[i].y) + a.M * a.of[i].N * size;
    }
  }
  return 0;
}
