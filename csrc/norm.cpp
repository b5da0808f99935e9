// RMSNorm: arguments, threads and the C entry points. The arithmetic is in norm_rows.h.
#include <memory>
#include <new>

#include "abi.h"
#include "isa.h"
#include "parallel.h"

namespace swathe {
namespace {

// One forward call: strides in elements, h and y dense, rows with adjacent features.
struct NormForward {
  const void *x, *r;
  void *y, *h;
  float* rstd;
  const float* scale;
  int32_t x_type, r_type, y_type;
  int64_t x_stride, r_stride, N;
  float eps;
  bool twice;
};

struct NormBackward {
  const void *dy, *h, *dh;
  void* dx;
  const float *rstd, *scale;
  int32_t dy_type, h_type;
  int64_t dy_stride, h_stride, dh_stride, N;
};

struct NormIsa {
  void (*forward)(const NormForward&, int64_t, int64_t);
  void (*backward)(const NormBackward&, int64_t, int64_t, float*);
  void (*prepare)(const void*, int32_t, float, float*, int64_t);
  void (*finish)(const float*, int64_t, int32_t, void*, int64_t);
};

// The type of a sum, by torch's rules: equal types keep theirs, different ones give fp32.
template <class A, class B>
struct Promote {
  using type = float;
};
template <class A>
struct Promote<A, A> {
  using type = A;
};

constexpr int64_t width(int32_t type) { return type == kFloat32 ? 4 : 2; }

}  // namespace
}  // namespace swathe

#define SWATHE_BODY "norm_rows.h"
#include "each_isa.h"

namespace swathe {
namespace {

const NormIsa& norm_for(int isa) {
#if defined(__x86_64__)
  switch (use_isa(isa)) {
    case kAvx512:
      return avx512::table;
    case kAvx2:
      return avx2::table;
    default:
      break;
  }
#endif
  return portable::table;
}

// Rows are summed into dw by blocks whose number depends on M alone: with any number of threads
// the additions are the same ones in the same order. Past 2048 rows a block has 32: longer chains
// of fp32 additions lose accuracy.
int64_t blocks_of(int64_t M) {
  return std::max<int64_t>(std::min<int64_t>(64, (M + 7) / 8), (M + 31) / 32);
}

}  // namespace
}  // namespace swathe

using namespace swathe;

// h is read (r_type == kNone) from x or written as x + r. Returns 0, or 1 without memory.
SWATHE_API int32_t swathe_rms_norm_forward(const void* x, const void* r, const void* weight, void* y,
                                           void* h, float* rstd, int32_t x_type, int32_t r_type,
                                           int32_t w_type, int32_t y_type, int64_t x_stride,
                                           int64_t r_stride, int64_t M, int64_t N, float eps,
                                           float offset, int32_t twice, int32_t threads,
                                           int32_t isa) {
  const NormIsa& norm = norm_for(isa);
  std::unique_ptr<float[]> scale(new (std::nothrow) float[N]);
  if (!scale) return 1;
  norm.prepare(weight, w_type, offset, scale.get(), N);
  const NormForward call = {x,      r,      y,        h,        rstd, scale.get(), x_type,
                            r_type, y_type, x_stride, r_stride, N,    eps,         twice != 0};
  const int64_t bytes = M * N * (width(x_type) + width(y_type));
  parallel_for(M, threads_for(bytes, M, threads),
               [&](int64_t begin, int64_t end) { norm.forward(call, begin, end); });
  return 0;
}

// dh may be null. Returns 0, or 1 without memory.
SWATHE_API int32_t swathe_rms_norm_backward(const void* dy, const void* h, const void* weight,
                                            const float* rstd, const void* dh, void* dx, void* dw,
                                            int32_t dy_type, int32_t h_type, int32_t w_type,
                                            int64_t dy_stride, int64_t h_stride, int64_t dh_stride,
                                            int64_t M, int64_t N, float offset, int32_t threads,
                                            int32_t isa) {
  const NormIsa& norm = norm_for(isa);
  const int64_t blocks = blocks_of(M);
  std::unique_ptr<float[]> scale(new (std::nothrow) float[N]);
  std::unique_ptr<float[]> partial(new (std::nothrow) float[blocks * N]());
  if (!scale || !partial) return 1;
  norm.prepare(weight, w_type, offset, scale.get(), N);
  const NormBackward call = {dy,      h,      dh,        dx,       rstd,      scale.get(),
                             dy_type, h_type, dy_stride, h_stride, dh_stride, N};
  const int64_t bytes = M * N * (width(dy_type) + 2 * width(h_type));
  parallel_for(blocks, threads_for(bytes, blocks, threads), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      norm.backward(call, M * block / blocks, M * (block + 1) / blocks, partial.get() + block * N);
    }
  });
  norm.finish(partial.get(), blocks, w_type, dw, N);
  return 0;
}
