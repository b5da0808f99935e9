// Vectors of SWATHE_LANES floats, and their loads, stores and roundings from every storage type.
//
// Included by each_isa.h once for each instruction set, hence no include guard. The vectors are the
// compilers' own extension: arithmetic needs no intrinsics, and where the hardware is narrower the
// compiler splits them. Rounding is to nearest, ties to even; NaN stays NaN.

typedef float vf __attribute__((vector_size(4 * SWATHE_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * SWATHE_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * SWATHE_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * SWATHE_LANES)));
typedef int8_t vb __attribute__((vector_size(SWATHE_LANES)));
typedef double vd __attribute__((vector_size(8 * SWATHE_LANES)));
typedef uint64_t vq __attribute__((vector_size(4 * SWATHE_LANES)));

constexpr int lanes = SWATHE_LANES;

SWATHE_INLINE vf all(float value) { return value - vf{}; }

SWATHE_INLINE vf floats_of(vu bits) {
  vf out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

SWATHE_INLINE vu bits_of(vf values) {
  vu out;
  std::memcpy(&out, &values, sizeof out);
  return out;
}

// a * b + c, rounded once where the hardware can.
SWATHE_INLINE vf fma(vf a, vf b, vf c) {
#if SWATHE_LANES == 16
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif SWATHE_LANES == 8
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

SWATHE_INLINE vf fma(vf a, float b, float c) { return fma(a, all(b), all(c)); }

SWATHE_INLINE vf fma(vf a, vf b, float c) { return fma(a, b, all(c)); }

// x within [low, high]; NaN passes. One instruction each, of which GCC makes two from comparisons.
SWATHE_INLINE vf at_most(vf x, float high) {
#if SWATHE_LANES == 16
  return (vf)_mm512_min_ps((__m512)all(high), (__m512)x);
#elif SWATHE_LANES == 8
  return (vf)_mm256_min_ps((__m256)all(high), (__m256)x);
#else
  return x > high ? all(high) : x;
#endif
}

SWATHE_INLINE vf at_least(vf x, float low) {
#if SWATHE_LANES == 16
  return (vf)_mm512_max_ps((__m512)all(low), (__m512)x);
#elif SWATHE_LANES == 8
  return (vf)_mm256_max_ps((__m256)all(low), (__m256)x);
#else
  return x < low ? all(low) : x;
#endif
}

// 16 bits to 32 and back; GCC takes twice the instructions for __builtin_convertvector.
SWATHE_INLINE vu wide_bits(vh half) {
#if SWATHE_LANES == 16
  return (vu)_mm512_cvtepu16_epi32((__m256i)half);
#elif SWATHE_LANES == 8
  return (vu)_mm256_cvtepu16_epi32((__m128i)half);
#else
  return __builtin_convertvector(half, vu);
#endif
}

SWATHE_INLINE vh narrow_bits(vu bits) {
#if SWATHE_LANES == 16
  return (vh)_mm512_cvtepi32_epi16((__m512i)bits);
#else
  return __builtin_convertvector(bits, vh);
#endif
}

SWATHE_INLINE vf widen(vh half, bf16) { return floats_of(wide_bits(half) << 16); }

// The bits of `values` rounded to bf16, which then stand in the upper half.
SWATHE_INLINE vu bf16_bits(vf values) {
  const vu bits = bits_of(values);
  const vu rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return values == values ? rounded : (bits | 0x400000);
}

SWATHE_INLINE vh narrow(vf values, bf16) {
  return narrow_bits(bf16_bits(values) >> 16);
}

SWATHE_INLINE vf widen(vh half, f16) {
#if SWATHE_F16C && SWATHE_LANES == 16
  return (vf)_mm512_cvtph_ps((__m256i)half);
#elif SWATHE_F16C
  return (vf)_mm256_cvtph_ps((__m128i)half);
#else
  // exponent and mantissa moved into place, then scaled by 2^112, which also mends subnormals
  const vu bits = __builtin_convertvector(half, vu);
  const vf scaled = floats_of((bits & 0x7fff) << 13) * 0x1p112f;
  const vu special = (vu)((bits & 0x7c00) == 0x7c00);
  return floats_of(bits_of(scaled) | (special & 0x7f800000) | ((bits & 0x8000) << 16));
#endif
}

SWATHE_INLINE vh narrow(vf values, f16) {
#if SWATHE_F16C && SWATHE_LANES == 16
  return (vh)_mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT);
#elif SWATHE_F16C
  return (vh)_mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT);
#else
  const vu bits = bits_of(values), sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
  // normal numbers: rebias the exponent and round 13 bits away
  const vu normal = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
  // subnormal results: adding 0.5 lets the adder round at the right place
  const vu small = bits_of(floats_of(size) + 0.5f) - 0x3f000000;
  const vu is_small = (vu)(size < 0x38800000), is_large = (vu)(size >= 0x477ff000);
  const vu is_nan = (vu)(size > 0x7f800000);
  vu out = (is_small & small) | (~is_small & normal);
  out = (is_large & 0x7c00) | (~is_large & out);
  out = (is_nan & 0x7e00) | (~is_nan & out);
  return __builtin_convertvector(out | sign, vh);
#endif
}

SWATHE_INLINE vf load(const float* p) {
  vf out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

SWATHE_INLINE vf load(const int8_t* p) {
#if SWATHE_LANES == 16
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif SWATHE_LANES == 8
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
  vb bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, vi), vf);
#endif
}

template <class T>
SWATHE_INLINE vf load(const T* p) {
  vh half;
  std::memcpy(&half, p, sizeof half);
  return widen(half, T{});
}

SWATHE_INLINE void store(float* p, vf values) { std::memcpy(p, &values, sizeof values); }

template <class T>
SWATHE_INLINE void store(T* p, vf values) {
  const vh half = narrow(values, T{});
  std::memcpy(p, &half, sizeof half);
}

// The last `count` < lanes elements of a row; the other lanes are 0.
template <class T>
SWATHE_INLINE vf load_part(const T* p, int64_t count) {
  T padded[lanes] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load(padded);
}

template <class T>
SWATHE_INLINE void store_part(T* p, vf values, int64_t count) {
  T padded[lanes];
  store(padded, values);
  std::memcpy(p, padded, count * sizeof(T));
}

// How much of a vector there is: all of it, or the end of a row.
struct Whole {};
struct Part {
  int64_t count;
};

template <class T>
SWATHE_INLINE vf load(const T* p, Whole) {
  return load(p);
}

template <class T>
SWATHE_INLINE vf load(const T* p, Part part) {
  return load_part(p, part.count);
}

template <class T>
SWATHE_INLINE void store(T* p, vf values, Whole) {
  store(p, values);
}

template <class T>
SWATHE_INLINE void store(T* p, vf values, Part part) {
  store_part(p, values, part.count);
}

// `values` as they are after a store to T and a load.
SWATHE_INLINE vf rounded(vf values, float) { return values; }

SWATHE_INLINE vf rounded(vf values, bf16) { return floats_of(bf16_bits(values) & 0xffff0000); }

SWATHE_INLINE vf rounded(vf values, f16 type) { return widen(narrow(values, type), type); }

SWATHE_INLINE vd doubles(vf values) { return __builtin_convertvector(values, vd); }

SWATHE_INLINE double sum(vd values) {
#if SWATHE_LANES == 16
  __m512d halves[2];
  std::memcpy(halves, &values, sizeof halves);
  return _mm512_reduce_add_pd(halves[0] + halves[1]);
#elif SWATHE_LANES == 8
  __m256d halves[2];
  std::memcpy(halves, &values, sizeof halves);
  const __m256d four = halves[0] + halves[1];
  const __m128d two = _mm256_castpd256_pd128(four) + _mm256_extractf128_pd(four, 1);
  return two[0] + two[1];
#else
  return (values[0] + values[2]) + (values[1] + values[3]);
#endif
}

// A store past the caches, for outputs that are larger than these: the line is not read first.
// `p` must be a multiple of the vector's size; call `streamed` before others may read.
SWATHE_INLINE void stream(float* p, vf values) {
#if SWATHE_LANES == 16
  _mm512_stream_ps(p, (__m512)values);
#elif SWATHE_LANES == 8
  _mm256_stream_ps(p, (__m256)values);
#else
  store(p, values);
#endif
}

template <class T>
SWATHE_INLINE void stream(T* p, vf values) {
#if SWATHE_LANES == 16
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrow(values, T{}));
#elif SWATHE_LANES == 8
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)narrow(values, T{}));
#else
  store(p, values);
#endif
}

SWATHE_INLINE void streamed() {
#if SWATHE_F16C
  _mm_sfence();
#endif
}

template <bool kStream, class T>
SWATHE_INLINE void store_as(T* p, vf values, Whole) {
  if (kStream) {
    stream(p, values);
  } else {
    store(p, values);
  }
}

template <bool kStream, class T>
SWATHE_INLINE void store_as(T* p, vf values, Part part) {
  store_part(p, values, part.count);
}

// Whether every vector of a row that begins at `p` may be streamed.
template <class T>
SWATHE_INLINE bool streamable(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (lanes * sizeof(T)) == 0;
}
