// Cross-entropy: arguments, threads and the C entry points; the arithmetic is in
// cross_entropy_rows.h.
#include <cstring>

#include "abi.h"
#include "blocks.h"
#include "choose.h"
#include "isa.h"
#include "parallel.h"

namespace swathe {
namespace {

// Rows of logits with adjacent classes, strides in elements, dx dense; softcap 0 is none.
struct Loss {
  const void *x, *labels;
  float *losses, *peak, *log_sum;
  const float* arriving;
  void* dx;
  int64_t x_type, wide_labels, x_stride, arriving_stride, V, ignore_index;  // wide: int64
  float smoothing, softcap, scale, z_loss;
  bool stream;
};

inline int64_t label_at(const Loss& a, int64_t m) {
  return a.wide_labels ? static_cast<const int64_t*>(a.labels)[m]
                       : static_cast<const int32_t*>(a.labels)[m];
}

}  // namespace
}  // namespace swathe

#define SWATHE_BODY "cross_entropy_rows.h"
#include "each_isa.h"

using namespace swathe;

// Arguments as kernels/cross_entropy/_cpp.py packs them; every field takes 8 bytes.
struct LossArguments {
  const void *x, *labels;
  float *losses, *peak, *log_sum;
  const float* arriving;
  void* dx;
  int64_t x_type, wide_labels, x_stride, arriving_stride, M, V, ignore_index, threads;
  double smoothing, softcap, scale, z_loss;
};

static Loss loss_of(const LossArguments& a) {
  return {a.x,
          a.labels,
          a.losses,
          a.peak,
          a.log_sum,
          a.arriving,
          a.dx,
          a.x_type,
          a.wide_labels,
          a.x_stride,
          a.arriving_stride,
          a.V,
          a.ignore_index,
          static_cast<float>(a.smoothing),
          static_cast<float>(a.softcap),
          static_cast<float>(a.scale),
          static_cast<float>(a.z_loss),
          worth_streaming(a.M * a.V * width(a.x_type))};
}

// losses, peak and log_sum, one of each a row.
SWATHE_API int32_t swathe_cross_entropy_forward(const void* packed) {
  LossArguments a;
  std::memcpy(&a, packed, sizeof a);
  const Loss call = loss_of(a);
  const auto forward = SWATHE_HERE(forward);
  const int64_t bytes = a.M * a.V * width(a.x_type);
  parallel_for(a.M, threads_for(bytes, a.M, static_cast<int>(a.threads)),
               [&](int64_t begin, int64_t end) { forward(call, begin, end); });
  return 0;
}

// dx from arriving, peak and log_sum.
SWATHE_API int32_t swathe_cross_entropy_backward(const void* packed) {
  LossArguments a;
  std::memcpy(&a, packed, sizeof a);
  const Loss call = loss_of(a);
  const auto backward = SWATHE_HERE(backward);
  const int64_t bytes = 2 * a.M * a.V * width(a.x_type);
  parallel_for(a.M, threads_for(bytes, a.M, static_cast<int>(a.threads)),
               [&](int64_t begin, int64_t end) { backward(call, begin, end); });
  return 0;
}
