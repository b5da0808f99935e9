// LayerNorm: arguments, threads and the C entry points. The arithmetic is in layer_norm_rows.h.
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
struct LayerForward {
  const void *x, *r;
  void *y, *h;
  float *mean, *rstd;
  const float *weight, *bias;
  int64_t x_type, r_type, x_stride, r_stride, N;
  double eps;
  bool stream;
};

struct LayerBackward {
  const void *dy, *h, *dh;
  void* dx;
  const float *mean, *rstd, *weight;
  int64_t h_type, dy_stride, h_stride, dh_stride, N;
  bool stream;
};

struct LayerNormIsa {
  void (*forward)(const LayerForward&, int64_t, int64_t);
  void (*backward)(const LayerBackward&, int64_t, int64_t, float*);
  void (*prepare)(const void*, int64_t, float, float, float*, int64_t);
  void (*finish)(const float*, int64_t, int64_t, void*, int64_t);
};

}  // namespace
}  // namespace swathe

#define SWATHE_BODY "layer_norm_rows.h"
#include "each_isa.h"

using namespace swathe;

// Arguments as kernels/layer_norm/_cpp.py packs them; every field takes 8 bytes.
struct LayerForwardArguments {
  const void *x, *r, *weight, *bias;
  void *y, *h;
  float* statistics;
  int64_t x_type, r_type, w_type, y_type, x_stride, r_stride, M, N;
  double eps;
  int64_t threads;
};

struct LayerBackwardArguments {
  const void *dy, *h, *weight;
  const float* statistics;
  const void* dh;
  void *dx, *sums;
  int64_t h_type, w_type, sums_type, dy_stride, h_stride, dh_stride, M, N, threads;
};

// h is read from x (r_type == kNone) or written as x + r; weight and bias may be null. Returns 0,
// or 1 without memory.
SWATHE_API int32_t swathe_layer_norm_forward(const void* packed) {
  LayerForwardArguments a;
  std::memcpy(&a, packed, sizeof a);
  const LayerNormIsa& norm = SWATHE_HERE(table);
  std::unique_ptr<float[]> weight(new (std::nothrow) float[2 * a.N]);
  if (!weight) return 1;
  float* bias = weight.get() + a.N;
  norm.prepare(a.weight, a.w_type, 0, 1, weight.get(), a.N);
  norm.prepare(a.bias, a.w_type, 0, 0, bias, a.N);
  const LayerForward call = {a.x,
                             a.r,
                             a.y,
                             a.h,
                             a.statistics,
                             a.statistics + a.M,
                             weight.get(),
                             bias,
                             a.x_type,
                             a.r_type,
                             a.x_stride,
                             a.r_stride,
                             a.N,
                             a.eps,
                             worth_streaming(a.M * a.N * width(a.y_type))};
  const int64_t bytes = a.M * a.N * (width(a.x_type) + width(a.y_type));
  parallel_for(a.M, threads_for(bytes, a.M, static_cast<int>(a.threads)),
               [&](int64_t begin, int64_t end) { norm.forward(call, begin, end); });
  return 0;
}

// weight and dh may be null; with sums_type == kNone nobody wants the gradients of weight and bias.
// Returns 0, or 1 without memory.
SWATHE_API int32_t swathe_layer_norm_backward(const void* packed) {
  LayerBackwardArguments a;
  std::memcpy(&a, packed, sizeof a);
  const LayerNormIsa& norm = SWATHE_HERE(table);
  const int64_t blocks = blocks_of(a.M);
  std::unique_ptr<float[]> weight(new (std::nothrow) float[a.N]);
  std::unique_ptr<float[]> partial(new (std::nothrow) float[blocks * 2 * a.N]());
  if (!weight || !partial) return 1;
  norm.prepare(a.weight, a.w_type, 0, 1, weight.get(), a.N);
  const LayerBackward call = {a.dy,
                              a.h,
                              a.dh,
                              a.dx,
                              a.statistics,
                              a.statistics + a.M,
                              weight.get(),
                              a.h_type,
                              a.dy_stride,
                              a.h_stride,
                              a.dh_stride,
                              a.N,
                              worth_streaming(a.M * a.N * width(a.h_type))};
  const int threads =
      threads_for(3 * a.M * a.N * width(a.h_type), blocks, static_cast<int>(a.threads));
  parallel_for(blocks, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      norm.backward(call, a.M * block / blocks, a.M * (block + 1) / blocks,
                    partial.get() + block * 2 * a.N);
    }
  });
  if (a.sums_type != kNone) {
    norm.finish(partial.get(), blocks, a.sums_type, a.sums, 2 * a.N);
  }
  return 0;
}
