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
constexpr int64_t kMostRows = 16;  // of x
constexpr int64_t kColumns = 64;   // outputs that are rounded and stored together

// One weight (N, K), rows with adjacent features, its bias (N,) or null, and its output (M, N).
struct Weights {
  const void *w, *bias;
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

using namespace swathe;

// Returns 0, or 1 without memory.
SWATHE_API int32_t swathe_linear(const void* packed) {
  Linear a = {};
  std::memcpy(static_cast<LinearArguments*>(&a), packed, sizeof(LinearArguments));
  const LinearIsa& here = SWATHE_HERE(tables)[a.type];
  const int64_t size = a.type == kFloat32 ? 4 : 2;
  a.width = (a.K + 15) / 16 * 16;
  a.pairs = has_bf16_pairs();
  float* x = scratch(a.M * a.width);
  if (x == nullptr) return 1;
  for (int64_t m = 0; m < a.M; ++m) {
    here.widen(static_cast<const char*>(a.x) + m * a.x_stride * size, x + m * a.width, a.K);
  }
  int64_t columns = 0;
  for (int64_t i = 0; i < a.count; ++i) columns += a.of[i].N;
  const int threads = threads_for(columns * a.K * size, columns, static_cast<int>(a.threads));
  parallel_for(columns, threads,
               [&](int64_t begin, int64_t end) { here.project(a, begin, end, x); });
  return 0;
}
