// y[m][n] = sum_k x[m][k] w[n][k] + bias[n] for few rows m; the body of linear.cpp.
//
// Rows of w are read once, four at a time, against up to four rows of x; sums are fp32, over lanes
// first, and rounded once with the bias. A result depends on nothing but its row
// of x and its row of w.

template <class X>
SWATHE_TARGET static void widen(const void* from, float* to, int64_t count) {
  const X* x = static_cast<const X*>(from);
  int64_t n = 0;
  for (; n + lanes <= count; n += lanes) store(to + n, load(x + n));
  if (n < count) store_part(to + n, load_part(x + n, count - n), count - n);
}

// Sums of R weights' rows against M rows of x, each still a vector, to out[m][r], rows of x apart.
template <int R, int M>
SWATHE_INLINE void reduce(const vf (&sums)[16], float* out) {
  float found[16];
  for (int i = 0; i < 4 * M; i += lanes) store(found + i, sums_of(sums + i));
  for (int m = 0; m < M; ++m) std::memcpy(out + m * kColumns, found + 4 * m, R * sizeof(float));
}

// R rows of w against M rows of x, `width` floats apart.
template <class X, int R, int M>
SWATHE_INLINE void dots(const X* w, int64_t stride, const float* x, int64_t width, int64_t K,
                        float* out) {
  vf sums[16] = {};
  int64_t k = 0;
  for (; k + lanes <= K; k += lanes) {
    vf rows[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) rows[r] = load(w + r * stride + k);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const vf values = load(x + m * width + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[4 * m + r] = fma(values, rows[r], sums[4 * m + r]);
    }
  }
  if (k < K) {
    for (int r = 0; r < R; ++r) {
      const vf row = load_part(w + r * stride + k, K - k);
      for (int m = 0; m < M; ++m) {
        vf& sum = sums[4 * m + r];
        sum = fma(load_part(x + m * width + k, K - k), row, sum);
      }
    }
  }
  reduce<R, M>(sums, out);
}

#if SWATHE_LANES == 16
#define SWATHE_PAIRS \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,avx512bf16")))

SWATHE_PAIRS static inline __attribute__((always_inline)) __m512bh pairs_of(const bf16* p,
                                                                            int64_t count) {
  const __mmask32 live = count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
  return (__m512bh)_mm512_maskz_loadu_epi16(live, p);
}

// `dots` in bf16 by instructions that multiply and add pairs: nothing is widened.
template <int R, int M>
SWATHE_PAIRS static void dots_of_pairs(const bf16* w, int64_t stride, const bf16* x,
                                       int64_t x_stride, int64_t K, float* out) {
  vf sums[16] = {};
  for (int64_t k = 0; k < K; k += 32) {
    __m512bh rows[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) rows[r] = pairs_of(w + r * stride + k, K - k);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const __m512bh values = pairs_of(x + m * x_stride + k, K - k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        vf& sum = sums[4 * m + r];
        sum = (vf)_mm512_dpbf16_ps((__m512)sum, values, rows[r]);
      }
    }
  }
  reduce<R, M>(sums, out);
}
#endif

// R rows of w against M rows of x, from row m on.
template <int R, int M, class X>
SWATHE_TARGET static void some_dots(const Linear& a, const Weights& of, int64_t m, const X* w,
                                    const float* x, float* out) {
#if SWATHE_LANES == 16
  if (std::is_same<X, bf16>::value && a.pairs) {
    const bf16* rows = static_cast<const bf16*>(a.x) + m * a.x_stride;
    const bf16* weights = reinterpret_cast<const bf16*>(w);
    return dots_of_pairs<R, M>(weights, of.w_stride, rows, a.x_stride, a.K, out);
  }
#endif
  dots<X, R, M>(w, of.w_stride, x + m * a.width, a.width, a.K, out);
}

// Column n, or n .. n + 4, of all rows of x; out is (M, kColumns).
template <int R, class X>
SWATHE_TARGET static void columns(const Linear& a, const Weights& of, int64_t n, const float* x,
                                  float* out) {
  const X* w = static_cast<const X*>(of.w) + n * of.w_stride;
  int64_t m = 0;
  for (; m + 4 <= a.M; m += 4) some_dots<R, 4>(a, of, m, w, x, out + m * kColumns);
  if (m + 3 == a.M) some_dots<R, 3>(a, of, m, w, x, out + m * kColumns);
  if (m + 2 == a.M) some_dots<R, 2>(a, of, m, w, x, out + m * kColumns);
  if (m + 1 == a.M) some_dots<R, 1>(a, of, m, w, x, out + m * kColumns);
}

// Columns n .. n + count of one weight's output, at most kColumns.
template <class X>
SWATHE_TARGET static void outputs(const Linear& a, const Weights& of, int64_t n, int64_t count,
                                  const float* x) {
  float found[kMostRows * kColumns];
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) columns<4, X>(a, of, n + i, x, found + i);
  for (; i < count; ++i) columns<1, X>(a, of, n + i, x, found + i);
  const X* bias = of.bias == nullptr ? nullptr : static_cast<const X*>(of.bias) + n;
  for (int64_t m = 0; m < a.M; ++m) {
    X* y = static_cast<X*>(of.y) + m * of.N + n;
    for (i = 0; i < count; i += lanes) {
      const int64_t part = std::min<int64_t>(lanes, count - i);
      vf values = load(found + m * kColumns + i);
      if (bias != nullptr) values += load_part(bias + i, part);
      store_part(y + i, values, part);
    }
  }
}

// Columns [begin, end) of the outputs, counted through all weights.
template <class X>
SWATHE_TARGET static void project(const Linear& a, int64_t begin, int64_t end, const float* x) {
  for (int64_t i = 0; i < a.count; ++i) {
    const Weights& of = a.of[i];
    const int64_t stop = std::min(end, of.N);
    for (int64_t n = std::max<int64_t>(begin, 0); n < stop; n += kColumns) {
      outputs<X>(a, of, n, std::min(kColumns, stop - n), x);
    }
    begin -= of.N;
    end -= of.N;
  }
}

static constexpr LinearIsa tables[] = {{widen<float>, project<float>},
                                       {widen<bf16>, project<bf16>},
                                       {widen<f16>, project<f16>}};
