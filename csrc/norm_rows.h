// RMSNorm over a range of rows; the body that norm.cpp compiles for each instruction set.
//
//   h = x + residual        rstd = 1 / sqrt(mean(h^2) + eps)        y = h * rstd * scale
//   dx = rstd * (g - xhat * mean(g * xhat)) + dh        g = dy * scale        xhat = h * rstd
//
// scale = offset + weight is fp32, prepared once for all rows. Arithmetic is fp32; sums run in
// vectors over kChunk columns and are then added up in double, so that long rows stay accurate.
// A row's result depends on nothing but the row: not on threads, neighbours or M.

constexpr int64_t kChunk = 64 * lanes;
constexpr int kGroup = 2;  // rows whose gradients are formed together
constexpr int kChains = 4;  // independent sums, so that an addition need not wait for the last

// h (stored if there is a residual) and sum(h^2) of one row.
template <class X, class R, class H, bool kAdd>
SWATHE_TARGET static double first_pass(const X* x, const R* r, H* h, int64_t N) {
  vd total = {};
  for (int64_t start = 0; start < N; start += kChunk) {
    const int64_t stop = std::min(start + kChunk, N);
    vf squares[kChains] = {};
    int64_t n = start;
    for (; n + kChains * lanes <= stop; n += kChains * lanes) {
      for (int k = 0; k < kChains; ++k) {
        vf v = load(x + n + k * lanes);
        if (kAdd) {
          v = rounded(v + load(r + n + k * lanes), H{});
          store(h + n + k * lanes, v);
        }
        squares[k] += v * v;
      }
    }
    for (; n < stop; n += lanes) {
      const int64_t count = std::min<int64_t>(lanes, stop - n);
      vf v = load_part(x + n, count);
      if (kAdd) {
        v = rounded(v + load_part(r + n, count), H{});
        store_part(h + n, v, count);
      }
      squares[0] += v * v;
    }
    total += doubles((squares[0] + squares[1]) + (squares[2] + squares[3]));
  }
  return sum(total);
}

// y of one row; kTwice rounds xhat to h's type before the weight, as HF's LlamaRMSNorm does.
template <class H, class Y, bool kTwice, bool kStream>
SWATHE_TARGET static void second_pass(const H* h, const float* scale, float rstd, Y* y, int64_t N) {
  int64_t n = 0;
  for (; n + lanes <= N; n += lanes) {
    vf v = load(h + n) * rstd;
    if (kTwice) v = rounded(v, H{});
    store_as<kStream>(y + n, v * load(scale + n));
  }
  if (n < N) {
    vf v = load_part(h + n, N - n) * rstd;
    if (kTwice) v = rounded(v, H{});
    store_part(y + n, v * load_part(scale + n, N - n), N - n);
  }
}

template <class X, class R, class H, class Y, bool kAdd, bool kTwice>
SWATHE_TARGET static void forward_rows(const NormForward& a, int64_t begin, int64_t end) {
  const X* x = static_cast<const X*>(a.x);
  const R* r = static_cast<const R*>(a.r);
  H* h = static_cast<H*>(a.h);
  Y* y = static_cast<Y*>(a.y);
  for (int64_t m = begin; m < end; ++m) {
    const R* r_row = kAdd ? r + m * a.r_stride : nullptr;
    H* h_row = kAdd ? h + m * a.N : nullptr;
    const double squares = first_pass<X, R, H, kAdd>(x + m * a.x_stride, r_row, h_row, a.N);
    const float mean = static_cast<float>(squares / static_cast<double>(a.N));
    const float rstd = 1.0f / std::sqrt(mean + a.eps);
    a.rstd[m] = rstd;
    const void* source = kAdd ? static_cast<const void*>(h_row) : x + m * a.x_stride;
    const H* h_read = static_cast<const H*>(source);
    Y* y_row = y + m * a.N;
    if (a.stream && streamable(y_row)) {
      second_pass<H, Y, kTwice, true>(h_read, a.scale, rstd, y_row, a.N);
    } else {
      second_pass<H, Y, kTwice, false>(h_read, a.scale, rstd, y_row, a.N);
    }
  }
  if (a.stream) streamed();
}

// sum(g * h) of one row.
template <class D, class H>
SWATHE_TARGET static double dot_pass(const D* dy, const H* h, const float* scale, int64_t N) {
  vd total = {};
  for (int64_t start = 0; start < N; start += kChunk) {
    const int64_t stop = std::min(start + kChunk, N);
    vf products[kChains] = {};
    int64_t n = start;
    for (; n + kChains * lanes <= stop; n += kChains * lanes) {
      for (int k = 0; k < kChains; ++k) {
        const int64_t at = n + k * lanes;
        products[k] += load(dy + at) * load(scale + at) * load(h + at);
      }
    }
    for (; n < stop; n += lanes) {
      const int64_t count = std::min<int64_t>(lanes, stop - n);
      const vf g = load_part(dy + n, count) * load_part(scale + n, count);
      products[0] += g * load_part(h + n, count);
    }
    total += doubles((products[0] + products[1]) + (products[2] + products[3]));
  }
  return sum(total);
}

// dx of kRows rows, and their share of dw: scale and dw are read once for all of them.
template <class D, class H, bool kAdd, bool kStream, int kRows>
SWATHE_TARGET static void gradient_pass(const NormBackward& a, int64_t m, const float* mean,
                                        float* dw) {
  const D* dy = static_cast<const D*>(a.dy) + m * a.dy_stride;
  const H* h = static_cast<const H*>(a.h) + m * a.h_stride;
  const H* dh = kAdd ? static_cast<const H*>(a.dh) + m * a.dh_stride : nullptr;
  H* dx = static_cast<H*>(a.dx) + m * a.N;
  const float* rstd = a.rstd + m;
  int64_t n = 0;
  for (; n + lanes <= a.N; n += lanes) {
    const vf scale = load(a.scale + n);
    vf share = load(dw + n);
    for (int k = 0; k < kRows; ++k) {
      const vf d = load(dy + k * a.dy_stride + n), xhat = load(h + k * a.h_stride + n) * rstd[k];
      vf out = (d * scale - xhat * mean[k]) * rstd[k];
      if (kAdd) out += load(dh + k * a.dh_stride + n);
      store_as<kStream>(dx + k * a.N + n, out);
      share += d * xhat;
    }
    store(dw + n, share);
  }
  const int64_t count = a.N - n;
  for (int k = 0; count > 0 && k < kRows; ++k) {
    const vf d = load_part(dy + k * a.dy_stride + n, count);
    const vf xhat = load_part(h + k * a.h_stride + n, count) * rstd[k];
    vf out = (d * load_part(a.scale + n, count) - xhat * mean[k]) * rstd[k];
    if (kAdd) out += load_part(dh + k * a.dh_stride + n, count);
    store_part(dx + k * a.N + n, out, count);
    store_part(dw + n, load_part(dw + n, count) + d * xhat, count);
  }
}

template <class D, class H, bool kAdd, int kRows>
SWATHE_TARGET static void backward_group(const NormBackward& a, int64_t m, float* dw) {
  const D* dy = static_cast<const D*>(a.dy) + m * a.dy_stride;
  const H* h = static_cast<const H*>(a.h) + m * a.h_stride;
  float mean[kRows];
  for (int k = 0; k < kRows; ++k) {
    const double dot = dot_pass(dy + k * a.dy_stride, h + k * a.h_stride, a.scale, a.N);
    mean[k] = static_cast<float>(dot / static_cast<double>(a.N) * a.rstd[m + k]);
  }
  const H* dx = static_cast<const H*>(a.dx) + m * a.N;
  if (a.stream && streamable(dx) && streamable(dx + a.N)) {
    gradient_pass<D, H, kAdd, true, kRows>(a, m, mean, dw);
  } else {
    gradient_pass<D, H, kAdd, false, kRows>(a, m, mean, dw);
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

template <class X>
static void forward_r(const NormForward& a, int64_t begin, int64_t end) {
  switch (a.r_type) {
    case kNone:
      return forward_y<X, X, X, false>(a, begin, end);
    case kFloat32:
      return forward_y<X, float, float, true>(a, begin, end);
    case kBFloat16:
      return forward_y<X, bf16, typename Promote<X, bf16>::type, true>(a, begin, end);
    default:
      return forward_y<X, f16, typename Promote<X, f16>::type, true>(a, begin, end);
  }
}

static void forward(const NormForward& a, int64_t begin, int64_t end) {
  switch (a.x_type) {
    case kFloat32:
      return forward_r<float>(a, begin, end);
    case kBFloat16:
      return forward_r<bf16>(a, begin, end);
    default:
      return forward_r<f16>(a, begin, end);
  }
}

template <class H>
static void backward_h(const NormBackward& a, int64_t begin, int64_t end, float* dw) {
  const bool add = a.dh != nullptr;
  if (a.dy_type == kFloat32) {
    return add ? backward_rows<float, H, true>(a, begin, end, dw)
               : backward_rows<float, H, false>(a, begin, end, dw);
  }
  return add ? backward_rows<H, H, true>(a, begin, end, dw)
             : backward_rows<H, H, false>(a, begin, end, dw);
}

static void backward(const NormBackward& a, int64_t begin, int64_t end, float* dw) {
  switch (a.h_type) {
    case kFloat32:
      return backward_h<float>(a, begin, end, dw);
    case kBFloat16:
      return backward_h<bf16>(a, begin, end, dw);
    default:
      return backward_h<f16>(a, begin, end, dw);
  }
}

template <class W>
SWATHE_TARGET static void scale_of(const void* weight, float offset, float* scale, int64_t N) {
  const W* w = static_cast<const W*>(weight);
  int64_t n = 0;
  for (; n + lanes <= N; n += lanes) store(scale + n, load(w + n) + offset);
  if (n < N) store_part(scale + n, load_part(w + n, N - n) + offset, N - n);
}

// total += value, with what rounding lost kept in `lost` (Kahan): the sum of many blocks stays as
// exact as that of one.
SWATHE_INLINE void add(vf& total, vf& lost, vf value) {
  const vf wanted = value - lost, reached = total + wanted;
  lost = (reached - total) - wanted;
  total = reached;
}

// dw[n] = sum over the blocks of rows, in their order.
template <class W>
SWATHE_TARGET static void sum_blocks(const float* partial, int64_t blocks, void* dw, int64_t N) {
  W* out = static_cast<W*>(dw);
  int64_t n = 0;
  for (; n + lanes <= N; n += lanes) {
    vf total = {}, lost = {};
    for (int64_t block = 0; block < blocks; ++block) {
      add(total, lost, load(partial + block * N + n));
    }
    store(out + n, total);
  }
  if (n < N) {
    vf total = {}, lost = {};
    for (int64_t block = 0; block < blocks; ++block) {
      add(total, lost, load_part(partial + block * N + n, N - n));
    }
    store_part(out + n, total, N - n);
  }
}

static void prepare(const void* weight, int64_t type, float offset, float* scale, int64_t N) {
  if (type == kFloat32) return scale_of<float>(weight, offset, scale, N);
  if (type == kBFloat16) return scale_of<bf16>(weight, offset, scale, N);
  return scale_of<f16>(weight, offset, scale, N);
}

static void finish(const float* partial, int64_t blocks, int64_t type, void* dw, int64_t N) {
  if (type == kFloat32) return sum_blocks<float>(partial, blocks, dw, N);
  if (type == kBFloat16) return sum_blocks<bf16>(partial, blocks, dw, N);
  return sum_blocks<f16>(partial, blocks, dw, N);
}

static constexpr NormIsa table = {forward, backward, prepare, finish};
