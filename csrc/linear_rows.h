// y[m][n] = sum_k x[m][k] w[n][k] + bias[n] for few rows m; the body of linear.cpp.
//
// Rows of w are read once, four at a time, against up to four rows of x; sums are fp32, over lanes
// first, and rounded once with the bias. A weight in int8 is widened as it is read, and its scale
// multiplies the sum: y[m][n] = (sum_k x[m][k] w[n][k]) scale[n] + bias[n]. A result depends on
// nothing but its row of x and its row of w.

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

// Asks for `count` numbers kAhead bytes after p: rows of some hundred bytes end before the hardware
// has guessed that more will be read (measured at one row: 26 to 30 GB/s in bf16, 11 to 30 in int8).
template <int count, class X>
SWATHE_INLINE void ask_ahead(const X* p) {
  const char* next = reinterpret_cast<const char*>(p) + kAhead;
#pragma GCC unroll 4
  for (int64_t at = 0; at < count * int64_t{sizeof(X)}; at += 64) __builtin_prefetch(next + at);
}

// R rows of w against M rows of x, `width` floats apart.
template <class X, int R, int M>
SWATHE_INLINE void dots(const X* w, int64_t stride, const float* x, int64_t width, int64_t K,
                        float* out) {
  vf sums[16] = {};
  int64_t k = 0;
  for (; k + lanes <= K; k += lanes) {
    ask_ahead<R * lanes>(w + R * k);
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
#define SWATHE_PAIRS_INLINE SWATHE_PAIRS static inline __attribute__((always_inline))

SWATHE_INLINE __mmask32 first_of_32(int64_t count) {
  return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

SWATHE_PAIRS_INLINE __m512bh pairs_of(const bf16* p, int64_t count) {
  return (__m512bh)_mm512_maskz_loadu_epi16(first_of_32(count), p);
}

// bf16 holds every int8.
SWATHE_PAIRS_INLINE __m512bh pairs_of(const int8_t* p, int64_t count) {
  const __m256i bytes = _mm256_maskz_loadu_epi8(first_of_32(count), p);
  const __m512i low = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes));
  const __m512i high = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1));
  return _mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low));
}

// `dots` with bf16 rows of x by instructions that multiply and add pairs: these are not widened.
template <class W, int R, int M>
SWATHE_PAIRS static void dots_of_pairs(const W* w, int64_t stride, const bf16* x, int64_t x_stride,
                                       int64_t K, float* out) {
  vf sums[16] = {};
  for (int64_t k = 0; k < K; k += 32) {
    ask_ahead<R * 32>(w + R * k);
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

SWATHE_PAIRS static void widen_row(const int8_t* from, bf16* to, int64_t count) {
  for (int64_t k = 0; k < count; k += 32) {
    ask_ahead<32>(from + k);
    const __m512i values = (__m512i)pairs_of(from + k, count - k);
    _mm512_mask_storeu_epi16(to + k, first_of_32(count - k), values);
  }
}
#endif

SWATHE_TARGET static void widen_row(const int8_t* from, float* to, int64_t count) {
  widen<int8_t>(from, to, count);
}

// Some columns of one weight's output, at most kColumns, the first of which is n; `w` are its rows.
template <class W>
struct Columns {
  const Weights& of;
  int64_t n, count;
  const W* w;
  int64_t stride;
};

// R rows of w against M rows of x, from row m on.
template <int R, int M, class W>
SWATHE_TARGET static void some_dots(const Linear& a, const W* w, int64_t stride, int64_t m,
                                    const float* x, float* out) {
#if SWATHE_LANES == 16
  if constexpr (!std::is_same_v<W, float> && !std::is_same_v<W, f16>) {
    if (a.pairs) {
      const bf16* rows = static_cast<const bf16*>(a.x) + m * a.x_stride;
      return dots_of_pairs<W, R, M>(w, stride, rows, a.x_stride, a.K, out);
    }
  }
#endif
  dots<W, R, M>(w, stride, x + m * a.width, a.width, a.K, out);
}

// R rows of w against rows [m, stop) of x; out is (stop - m, kColumns).
template <int R, class W>
SWATHE_TARGET static void few_columns(const Linear& a, const W* w, int64_t stride, int64_t m,
                                      int64_t stop, const float* x, float* out) {
  for (; m + 4 <= stop; m += 4, out += 4 * kColumns) some_dots<R, 4>(a, w, stride, m, x, out);
  if (m + 3 == stop) some_dots<R, 3>(a, w, stride, m, x, out);
  if (m + 2 == stop) some_dots<R, 2>(a, w, stride, m, x, out);
  if (m + 1 == stop) some_dots<R, 1>(a, w, stride, m, x, out);
}

// These columns of all rows of the output.
template <class X, class W>
SWATHE_TARGET static void outputs(const Linear& a, const Columns<W>& c, const float* x) {
  float found[kMostRows * kColumns];
  const X* bias = c.of.bias == nullptr ? nullptr : static_cast<const X*>(c.of.bias) + c.n;
  const float* scales = c.of.scales == nullptr ? nullptr : c.of.scales + c.n;
  for (int64_t first = 0; first < a.M; first += kMostRows) {
    const int64_t stop = std::min(a.M, first + kMostRows);
    int64_t i = 0;
    for (; i + 4 <= c.count; i += 4) {
      few_columns<4>(a, c.w + i * c.stride, c.stride, first, stop, x, found + i);
    }
    for (; i < c.count; ++i) {
      few_columns<1>(a, c.w + i * c.stride, c.stride, first, stop, x, found + i);
    }
    for (int64_t m = first; m < stop; ++m) {
      X* y = static_cast<X*>(c.of.y) + m * c.of.N + c.n;
      for (i = 0; i < c.count; i += lanes) {
        const int64_t part = std::min<int64_t>(lanes, c.count - i);
        vf values = load(found + (m - first) * kColumns + i);
        if (scales != nullptr) values *= load_part(scales + i, part);
        if (bias != nullptr) values += load_part(bias + i, part);
        store_part(y + i, values, part);
      }
    }
  }
}

// `outputs` of int8 columns, which are widened to W once for all rows of x; `room` holds kColumns.
template <class X, class W>
SWATHE_TARGET static void widened(const Linear& a, const Columns<int8_t>& c, const float* x,
                                  void* room) {
  W* rows = static_cast<W*>(room);
  for (int64_t i = 0; i < c.count; ++i) widen_row(c.w + i * c.stride, rows + i * a.K, a.K);
  outputs<X, W>(a, {c.of, c.n, c.count, rows, a.K}, x);
}

// Columns [begin, end) of the outputs, counted through all weights.
template <class X>
SWATHE_TARGET static void project(const Linear& a, int64_t begin, int64_t end, const float* x) {
  // one pass over few rows widens as it reads, and so does any without memory: the same numbers
  float* room = a.M > 4 ? scratch<1>(kColumns * a.K) : nullptr;
  for (int64_t i = 0; i < a.count; ++i) {
    const Weights& of = a.of[i];
    const int64_t stop = std::min(end, of.N), stride = of.w_stride;
    for (int64_t n = std::max<int64_t>(begin, 0); n < stop; n += kColumns) {
      const int64_t count = std::min(kColumns, stop - n);
      if (of.scales == nullptr) {
        outputs<X, X>(a, {of, n, count, static_cast<const X*>(of.w) + n * stride, stride}, x);
        continue;
      }
      const int8_t* w = static_cast<const int8_t*>(of.w) + n * stride;
      const Columns<int8_t> c = {of, n, count, w, stride};
      if (room == nullptr) {
        outputs<X, int8_t>(a, c, x);
#if SWATHE_LANES == 16
      } else if (a.pairs) {
        widened<X, bf16>(a, c, x, room);
#endif
      } else {
        widened<X, float>(a, c, x, room);
      }
    }
    begin -= of.N;
    end -= of.N;
  }
}

static constexpr LinearIsa tables[] = {{widen<float>, project<float>},
                                       {widen<bf16>, project<bf16>},
                                       {widen<f16>, project<f16>}};
