// RMSNorm: arguments, threads and the C entry points. The arithmetic is in norm_rows.h.
#include <cstring>
#include <memory>
#include <new>

#include "abi.h"
#include "blocks.h"
#include "choose.h"
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
  bool twice, stream;
};

struct NormBackward {
  const void *dy, *h, *dh;
  void* dx;
  const float *rstd, *scale;
  int32_t dy_type, h_type;
  int64_t dy_stride, h_stride, dh_stride, N;
  bool stream;
};

struct NormIsa {
  void (*forward)(const NormForward&, int64_t, int64_t);
  void (*backward)(const NormBackward&, int64_t, int64_t, float*);
  void (*prepare)(const void*, int64_t, float, float, float*, int64_t);
  void (*finish)(const float*, int64_t, int64_t, void*, int64_t);
};

}  // namespace
}  // namespace swathe

#define SWATHE_BODY "norm_rows.h"
#include "each_isa.h"

using namespace swathe;

// Arguments as kernels/norm/_cpp.py packs them: one pointer is cheaper to pass from Python than
// nineteen arguments. Every field takes 8 bytes.
struct ForwardArguments {
  const void *x, *r, *weight;
  void *y, *h;
  float* rstd;
  int64_t x_type, r_type, w_type, y_type, x_stride, r_stride, M, N;
  double eps, offset;
  int64_t twice, threads;
};

struct BackwardArguments {
  const void *dy, *h, *weight;
  const float* rstd;
  const void* dh;
  void *dx, *dw;
  int64_t dy_type, h_type, w_type, dy_stride, h_stride, dh_stride, M, N;
  double offset;
  int64_t threads;
};

// h is read from x (r_type == kNone) or written as x + r. Returns 0, or 1 without memory.
SWATHE_API int32_t swathe_rms_norm_forward(const void* packed) {
  ForwardArguments a;
  std::memcpy(&a, packed, sizeof a);
  const NormIsa& norm = SWATHE_HERE(table);
  std::unique_ptr<float[]> scale(new (std::nothrow) float[a.N]);
  if (!scale) return 1;
  norm.prepare(a.weight, a.w_type, static_cast<float>(a.offset), 1, scale.get(), a.N);
  const NormForward call = {a.x,
                            a.r,
                            a.y,
                            a.h,
                            a.rstd,
                            scale.get(),
                            static_cast<int32_t>(a.x_type),
                            static_cast<int32_t>(a.r_type),
                            static_cast<int32_t>(a.y_type),
                            a.x_stride,
                            a.r_stride,
                            a.N,
                            static_cast<float>(a.eps),
                            a.twice != 0,
                            worth_streaming(a.M * a.N * width(a.y_type))};
  const int64_t bytes = a.M * a.N * (width(call.x_type) + width(call.y_type));
  parallel_for(a.M, threads_for(bytes, a.M, static_cast<int>(a.threads)),
               [&](int64_t begin, int64_t end) { norm.forward(call, begin, end); });
  return 0;
}

// dh may be null. Returns 0, or 1 without memory.
SWATHE_API int32_t swathe_rms_norm_backward(const void* packed) {
  BackwardArguments a;
  std::memcpy(&a, packed, sizeof a);
  const NormIsa& norm = SWATHE_HERE(table);
  const int64_t blocks = blocks_of(a.M);
  std::unique_ptr<float[]> scale(new (std::nothrow) float[a.N]);
  std::unique_ptr<float[]> partial(new (std::nothrow) float[blocks * a.N]());
  if (!scale || !partial) return 1;
  norm.prepare(a.weight, a.w_type, static_cast<float>(a.offset), 1, scale.get(), a.N);
  const NormBackward call = {a.dy,
                             a.h,
                             a.dh,
                             a.dx,
                             a.rstd,
                             scale.get(),
                             static_cast<int32_t>(a.dy_type),
                             static_cast<int32_t>(a.h_type),
                             a.dy_stride,
                             a.h_stride,
                             a.dh_stride,
                             a.N,
                             worth_streaming(a.M * a.N * width(a.h_type))};
  const int64_t bytes = a.M * a.N * (width(call.dy_type) + 2 * width(call.h_type));
  const int threads = threads_for(bytes, blocks, static_cast<int>(a.threads));
  parallel_for(blocks, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      norm.backward(call, a.M * block / blocks, a.M * (block + 1) / blocks,
                    partial.get() + block * a.N);
    }
  });
  norm.finish(partial.get(), blocks, a.w_type, a.dw, a.N);
  return 0;
}
