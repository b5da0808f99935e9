// Gated activations: arguments, threads and the C entry points; the arithmetic is in gated_rows.h.
#include <cstring>

#include "abi.h"
#include "blocks.h"
#include "choose.h"
#include "isa.h"
#include "parallel.h"

namespace swathe {
namespace {

// kernels/gated_mlp_act/_cpp.py: _ACTS.
enum Act : int64_t { kSilu = 0, kGeluTanh, kGelu, kRelu, kRelu2, kGptOss };

// Arguments as kernels/gated_mlp_act/_cpp.py packs them, strides in elements; every field takes 8
// bytes. Interleaved pairs are read at gate and, as gradients, written at first; N counts pairs.
struct Gated {
  const void *dy, *gate, *up;
  void *first, *second;  // y, or dgate and dup
  int64_t dy_stride, gate_stride, up_stride, out_stride, M, N;
  int64_t type, act, llama, pairs, threads;
  double limit, alpha;
};

}  // namespace
}  // namespace swathe

#define SWATHE_BODY "gated_rows.h"
#include "each_isa.h"

namespace swathe {
namespace {

constexpr int64_t kShare = 1024;  // elements that one thread takes at least

// Calls work(m, n, count) for the rows' parts that make up each thread's share of M * N elements.
template <class Work>
void over_elements(const Gated& a, int64_t bytes_each, const Work& work) {
  const int64_t total = a.M * a.N, shares = (total + kShare - 1) / kShare;
  const int threads = threads_for(total * bytes_each, shares, static_cast<int>(a.threads));
  parallel_for(shares, threads, [&](int64_t begin, int64_t end) {
    const int64_t stop = std::min(end * kShare, total);
    for (int64_t at = begin * kShare; at < stop;) {
      const int64_t n = at % a.N, count = std::min(a.N - n, stop - at);
      work(at / a.N, n, count);
      at += count;
    }
  });
}

}  // namespace
}  // namespace swathe

using namespace swathe;

// y, where every row of every tensor may have a stride of its own; dy and second are not looked at.
SWATHE_API int32_t swathe_gated_mlp_act_forward(const void* packed) {
  Gated a;
  std::memcpy(&a, packed, sizeof a);
  const bool stream = worth_streaming(a.M * a.N * width(a.type));
  const auto forward = SWATHE_HERE(forward);
  over_elements(a, 3 * width(a.type), [&](int64_t m, int64_t n, int64_t count) {
    forward(a, stream, m, n, count);
  });
  return 0;
}

SWATHE_API int32_t swathe_gated_mlp_act_backward(const void* packed) {
  Gated a;
  std::memcpy(&a, packed, sizeof a);
  const bool stream = worth_streaming(2 * a.M * a.N * width(a.type));
  const auto backward = SWATHE_HERE(backward);
  over_elements(a, 5 * width(a.type), [&](int64_t m, int64_t n, int64_t count) {
    backward(a, stream, m, n, count);
  });
  return 0;
}
