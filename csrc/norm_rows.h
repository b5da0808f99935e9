// RMSNorm over a range of rows; the body that norm.cpp compiles for each instruction set.
//
//   h = x + residual        rstd = 1 / sqrt(mean(h^2) + eps)        y = h * rstd * scale
//   dx = rstd * (g - xhat * mean(g * xhat)) + dh        g = dy * scale        xhat = h * rstd
//
// scale = offset + weight is fp32, prepared once for all rows. Arithmetic is fp32.
// A row's result depends on nothing but the row: not on threads, neighbours or M.
#include "row_loops.h"
#include "row_weights.h"

constexpr int kGroup = 2;  // rows whose gradients are formed together

// sum(h^2) of one row.
template <class Row>
struct Squares {
  Row row;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w, vf* sums) const {
    const vf v = row.sum(n, w);
    sums[0] += v * v;
  }
};

// y of one row; kTwice rounds xhat to h's type before the weight, as HF's LlamaRMSNorm does.
template <class H, class Y, bool kTwice, bool kStream>
struct Scale {
  const H* h;
  const float* scale;
  float rstd;
  Y* y;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w) const {
    vf v = load(h + n, w) * rstd;
    if (kTwice) v = rounded(v, H{});
    store_as<kStream>(y + n, v * load(scale + n, w), w);
  }
};

template <class X, class R, class H, class Y, bool kAdd, bool kTwice>
SWATHE_TARGET static void forward_rows(const NormForward& a, int64_t begin, int64_t end) {
  Y* y = static_cast<Y*>(a.y);
  for (int64_t m = begin; m < end; ++m) {
    const auto row = summands<X, R, H, kAdd>(a, m);
    double squares[1];
    row_sums(a.N, Squares<decltype(row)>{row}, squares);
    const float mean = static_cast<float>(squares[0] / static_cast<double>(a.N));
    const float rstd = 1.0f / std::sqrt(mean + a.eps);
    a.rstd[m] = rstd;
    const H* h = row.row();
    Y* y_row = y + m * a.N;
    if (a.stream && streamable(y_row)) {
      each_column(a.N, Scale<H, Y, kTwice, true>{h, a.scale, rstd, y_row});
    } else {
      each_column(a.N, Scale<H, Y, kTwice, false>{h, a.scale, rstd, y_row});
    }
  }
  if (a.stream) streamed();
}

// sum(g * h) of one row.
template <class D, class H>
struct Dot {
  const D* dy;
  const H* h;
  const float* scale;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w, vf* sums) const {
    sums[0] += load(dy + n, w) * load(scale + n, w) * load(h + n, w);
  }
};

// dx of kRows rows, and their share of dw: scale and dw are read once for all of them.
template <class D, class H, bool kAdd, bool kStream, int kRows>
struct Gradient {
  const NormBackward& a;
  const D* dy;
  const H *h, *dh;
  H* dx;
  const float *rstd, *mean;
  float* dw;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w) const {
    const vf scale = load(a.scale + n, w);
    vf share = load(dw + n, w);
    for (int k = 0; k < kRows; ++k) {
      const vf d = load(dy + k * a.dy_stride + n, w);
      const vf xhat = load(h + k * a.h_stride + n, w) * rstd[k];
      vf out = (d * scale - xhat * mean[k]) * rstd[k];
      if (kAdd) out += load(dh + k * a.dh_stride + n, w);
      store_as<kStream>(dx + k * a.N + n, out, w);
      share += d * xhat;
    }
    store(dw + n, share, w);
  }
};

template <class D, class H, bool kAdd, int kRows>
SWATHE_TARGET static void backward_group(const NormBackward& a, int64_t m, float* dw) {
  const D* dy = static_cast<const D*>(a.dy) + m * a.dy_stride;
  const H* h = static_cast<const H*>(a.h) + m * a.h_stride;
  const H* dh = kAdd ? static_cast<const H*>(a.dh) + m * a.dh_stride : nullptr;
  H* dx = static_cast<H*>(a.dx) + m * a.N;
  const float* rstd = a.rstd + m;
  float mean[kRows];
  for (int k = 0; k < kRows; ++k) {
    double dot[1];
    row_sums(a.N, Dot<D, H>{dy + k * a.dy_stride, h + k * a.h_stride, a.scale}, dot);
    mean[k] = static_cast<float>(dot[0] / static_cast<double>(a.N) * rstd[k]);
  }
  if (a.stream && streamable(dx) && streamable(dx + a.N)) {
    each_column(a.N, Gradient<D, H, kAdd, true, kRows>{a, dy, h, dh, dx, rstd, mean, dw});
  } else {
    each_column(a.N, Gradient<D, H, kAdd, false, kRows>{a, dy, h, dh, dx, rstd, mean, dw});
  }
}

template <class D, class H, bool kAdd>
SWATHE_TARGET static void backward_rows(const NormBackward& a, int64_t begin, int64_t end,
                                        float* dw) {
  int64_t m = begin;
  for (; m + kGroup <= end; m += kGroup) backward_group<D, H, kAdd, kGroup>(a, m, dw);
  for (; m < end; ++m) backward_group<D, H, kAdd, 1>(a, m, dw);
  if (a.stream) streamed();
}

template <class X, class R, class H, bool kAdd>
static void forward_y(const NormForward& a, int64_t begin, int64_t end) {
  if (a.twice) {
    if (a.y_type == kFloat32) return forward_rows<X, R, H, float, kAdd, true>(a, begin, end);
    return forward_rows<X, R, H, H, kAdd, true>(a, begin, end);
  }
  return forward_rows<X, R, H, H, kAdd, false>(a, begin, end);
}

static void forward(const NormForward& a, int64_t begin, int64_t end) {
  with_summands(a.x_type, a.r_type, [&](auto x, auto r, auto h, auto add) {
    forward_y<decltype(x), decltype(r), decltype(h), decltype(add)::value>(a, begin, end);
  });
}

static void backward(const NormBackward& a, int64_t begin, int64_t end, float* dw) {
  with_type(a.h_type, [&](auto h) {
    with_bool(a.dh != nullptr, [&](auto add) {
      using H = decltype(h);
      constexpr bool kAdd = decltype(add)::value;
      if (a.dy_type == kFloat32) return backward_rows<float, H, kAdd>(a, begin, end, dw);
      backward_rows<H, H, kAdd>(a, begin, end, dw);
    });
  });
}

static constexpr NormIsa table = {forward, backward, prepare, finish};
