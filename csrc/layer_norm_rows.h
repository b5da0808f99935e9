// LayerNorm over a range of rows; the body of layer_norm.cpp for each instruction set.
//
//   h = x + residual        rstd = 1 / sqrt(mean((h - mean(h))^2) + eps)
//   y = xhat * w + b        xhat = (h - mean) * rstd
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dh        g = dy * w
//
// w and b are fp32, prepared once for all rows. The variance is that of centred values, and what
// fp32 cannot hold of a mean is subtracted too, so rows far from zero keep their digits. A row's
// result depends on nothing but the row.
#include "row_loops.h"
#include "row_weights.h"

constexpr int kGroup = 2;  // rows whose gradients are formed together

template <class Row>
struct Sum {
  Row row;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w, vf* sums) const {
    sums[0] += row.sum(n, w);
  }
};

// sum(h - mean) and its squares.
template <class H>
struct Centred {
  const H* h;
  float mean;

  SWATHE_METHOD void operator()(int64_t n, Whole w, vf* sums) const {
    const vf v = load(h + n, w) - mean;
    sums[0] += v;
    sums[1] += v * v;
  }

  SWATHE_METHOD void operator()(int64_t n, Part w, vf* sums) const {
    // what is not there is 0 after the subtraction, not before
    float centred[lanes] = {};
    store(centred, load(h + n, w) - mean, w);
    const vf v = load(centred, w);
    sums[0] += v;
    sums[1] += v * v;
  }
};

template <class H, bool kStream>
struct Shift {
  const H* h;
  const float *weight, *bias;
  float mean, rest, rstd;
  H* y;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w) const {
    const vf xhat = ((load(h + n, w) - mean) - rest) * rstd;
    store_as<kStream>(y + n, xhat * load(weight + n, w) + load(bias + n, w), w);
  }
};

template <class X, class R, class H, bool kAdd>
SWATHE_TARGET static void forward_rows(const LayerForward& a, int64_t begin, int64_t end) {
  const double N = static_cast<double>(a.N);
  for (int64_t m = begin; m < end; ++m) {
    const auto row = summands<X, R, H, kAdd>(a, m);
    double sum[1], centred[2];
    row_sums(a.N, Sum<decltype(row)>{row}, sum);
    const float mean = static_cast<float>(sum[0] / N);
    row_sums(a.N, Centred<H>{row.row(), mean}, centred);
    // of rows far from zero the first sum lost digits, the second did not
    const double rest = centred[0] / N, variance = std::max(centred[1] / N - rest * rest, 0.0);
    a.mean[m] = static_cast<float>(mean + rest);
    const float rstd = a.rstd[m] = static_cast<float>(1 / std::sqrt(variance + a.eps));
    const float low = static_cast<float>(rest);
    H* y = static_cast<H*>(a.y) + m * a.N;
    if (a.stream && streamable(y)) {
      each_column(a.N, Shift<H, true>{row.row(), a.weight, a.bias, mean, low, rstd, y});
    } else {
      each_column(a.N, Shift<H, false>{row.row(), a.weight, a.bias, mean, low, rstd, y});
    }
  }
  if (a.stream) streamed();
}

// sum(g) and sum(g * (h - mean)) of one row.
template <class H>
struct Dots {
  const H *dy, *h;
  const float* weight;
  float mean;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w, vf* sums) const {
    const vf g = load(dy + n, w) * load(weight + n, w);
    sums[0] += g;
    sums[1] += g * (load(h + n, w) - mean);
  }
};

// Of one row, what its gradient needs.
struct RowFacts {
  float mean, rstd, g_mean, g_dot;
};

// dx of kRows rows, and their share of dw and db: weights and sums are read once for all of them.
template <class H, bool kAdd, bool kStream, int kRows>
struct Gradient {
  const LayerBackward& a;
  const H *dy, *h, *dh;
  H* dx;
  const RowFacts* of;
  float *dw, *db;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w) const {
    const vf weight = load(a.weight + n, w);
    vf to_w = load(dw + n, w), to_b = load(db + n, w);
    for (int k = 0; k < kRows; ++k) {
      const vf d = load(dy + k * a.dy_stride + n, w);
      const vf xhat = (load(h + k * a.h_stride + n, w) - of[k].mean) * of[k].rstd;
      vf out = (d * weight - of[k].g_mean - xhat * of[k].g_dot) * of[k].rstd;
      if (kAdd) out += load(dh + k * a.dh_stride + n, w);
      store_as<kStream>(dx + k * a.N + n, out, w);
      to_w += d * xhat;
      to_b += d;
    }
    store(dw + n, to_w, w);
    store(db + n, to_b, w);
  }
};

template <class H, bool kAdd, int kRows>
SWATHE_TARGET static void backward_group(const LayerBackward& a, int64_t m, float* dw) {
  const H* dy = static_cast<const H*>(a.dy) + m * a.dy_stride;
  const H* h = static_cast<const H*>(a.h) + m * a.h_stride;
  const H* dh = kAdd ? static_cast<const H*>(a.dh) + m * a.dh_stride : nullptr;
  H* dx = static_cast<H*>(a.dx) + m * a.N;
  float* db = dw + a.N;
  RowFacts of[kRows];
  for (int k = 0; k < kRows; ++k) {
    const float mean = a.mean[m + k], rstd = a.rstd[m + k];
    double dots[2];
    row_sums(a.N, Dots<H>{dy + k * a.dy_stride, h + k * a.h_stride, a.weight, mean}, dots);
    const double N = static_cast<double>(a.N);
    of[k] = {mean, rstd, static_cast<float>(dots[0] / N), static_cast<float>(dots[1] / N * rstd)};
  }
  if (a.stream && streamable(dx) && streamable(dx + a.N)) {
    each_column(a.N, Gradient<H, kAdd, true, kRows>{a, dy, h, dh, dx, of, dw, db});
  } else {
    each_column(a.N, Gradient<H, kAdd, false, kRows>{a, dy, h, dh, dx, of, dw, db});
  }
}

template <class H, bool kAdd>
SWATHE_TARGET static void backward_rows(const LayerBackward& a, int64_t begin, int64_t end,
                                        float* dw) {
  int64_t m = begin;
  for (; m + kGroup <= end; m += kGroup) backward_group<H, kAdd, kGroup>(a, m, dw);
  for (; m < end; ++m) backward_group<H, kAdd, 1>(a, m, dw);
  if (a.stream) streamed();
}

static void forward(const LayerForward& a, int64_t begin, int64_t end) {
  with_summands(a.x_type, a.r_type, [&](auto x, auto r, auto h, auto add) {
    forward_rows<decltype(x), decltype(r), decltype(h), decltype(add)::value>(a, begin, end);
  });
}

// dw: N sums for the weight and N for the bias.
static void backward(const LayerBackward& a, int64_t begin, int64_t end, float* dw) {
  with_type(a.h_type, [&](auto h) {
    with_bool(a.dh != nullptr, [&](auto add) {
      backward_rows<decltype(h), decltype(add)::value>(a, begin, end, dw);
    });
  });
}

static constexpr LayerNormIsa table = {forward, backward, prepare, finish};
