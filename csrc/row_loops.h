// Loops over the columns of a row, for the bodies of ops; included once for each instruction set.
//
// A step is a struct whose operator()(n, w, ...) handles the vector at column n: `w` is Whole, or
// Part with the number of columns that are left. Written once, it serves the loop and its end.

constexpr int64_t kChunk = 64 * lanes;
constexpr int kChains = 4;  // independent sums, so that an addition need not wait for the last

template <class Step>
SWATHE_INLINE void each_column(int64_t N, const Step& step) {
  int64_t n = 0;
  for (; n + lanes <= N; n += lanes) step(n, Whole{});
  if (n < N) step(n, Part{N - n});
}

// Sums over a row: step(n, w, sums) adds a vector's terms to kSums vectors. They run over kChunk
// columns in fp32 and are then added up in double, so that long rows stay accurate.
template <int kSums, class Step>
SWATHE_INLINE void row_sums(int64_t N, const Step& step, double (&totals)[kSums]) {
  vd total[kSums] = {};
  for (int64_t start = 0; start < N; start += kChunk) {
    const int64_t stop = std::min(start + kChunk, N);
    vf sums[kChains][kSums] = {};
    int64_t n = start;
    for (; n + kChains * lanes <= stop; n += kChains * lanes) {
      for (int k = 0; k < kChains; ++k) step(n + k * lanes, Whole{}, sums[k]);
    }
    for (; n + lanes <= stop; n += lanes) step(n, Whole{}, sums[0]);
    if (n < stop) step(n, Part{stop - n}, sums[0]);
    for (int i = 0; i < kSums; ++i) {
      total[i] += doubles((sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]));
    }
  }
  for (int i = 0; i < kSums; ++i) totals[i] = sum(total[i]);
}

// A row of h = x + r, rounded as torch rounds the sum, and stored; without r (kAdd) h is x itself.
template <class X, class R, class H, bool kAdd>
struct Summands {
  const X* x;
  const R* r;
  H* h;

  template <class W>
  SWATHE_METHOD vf sum(int64_t n, W w) const {
    vf v = load(x + n, w);
    if (kAdd) {
      v = rounded(v + load(r + n, w), H{});
      store(h + n, v, w);
    }
    return v;
  }

  // Where h can be read once it is summed.
  const H* row() const {
    return static_cast<const H*>(kAdd ? static_cast<const void*>(h) : x);
  }
};

// Those of row m.
template <class X, class R, class H, bool kAdd, class Call>
static Summands<X, R, H, kAdd> summands(const Call& a, int64_t m) {
  return {static_cast<const X*>(a.x) + m * a.x_stride,
          kAdd ? static_cast<const R*>(a.r) + m * a.r_stride : nullptr,
          kAdd ? static_cast<H*>(a.h) + m * a.N : nullptr};
}

template <class T>
struct Widen {
  const T* from;
  float* to;
  float offset;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w) const {
    const vf v = load(from + n, w);
    store(to + n, offset == 0 ? v : v + offset, w);
  }
};

template <class T>
SWATHE_TARGET static void widen_row(const T* from, float* to, int64_t count, float offset = 0) {
  each_column(count, Widen<T>{from, to, offset});
}
