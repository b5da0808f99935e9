// Sums over the lanes of a vector. Included in bodies, hence no include guard.

SWATHE_INLINE float sum_of(vf x) {
#if SWATHE_LANES == 16
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total = 0.0f;
  for (int lane = 0; lane < lanes; ++lane) total += x[lane];
  return total;
#endif
}

// The sums of `lanes` vectors, each over its own lanes.
SWATHE_INLINE vf sums_of(const vf* x) {
#if SWATHE_LANES == 16
  // pairs, then fours within 128 bits, then across them: 45 instructions instead of 16 sums
  __m512 two[8], four[4], part[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 a = (__m512)x[2 * i], b = (__m512)x[2 * i + 1];
    two[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = (__m512d)two[2 * i], b = (__m512d)two[2 * i + 1];
    four[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512 a = four[2 * i], b = four[2 * i + 1];
    part[i] =
        _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  return (vf)_mm512_add_ps(_mm512_shuffle_f32x4(part[0], part[1], 0x88),
                           _mm512_shuffle_f32x4(part[0], part[1], 0xdd));
#else
  vf out;
  for (int i = 0; i < lanes; ++i) out[i] = sum_of(x[i]);
  return out;
#endif
}
