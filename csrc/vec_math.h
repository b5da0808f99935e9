// Functions of vectors that the hardware lacks, for the bodies of ops: to a few units of 2^-24 of
// the result over the whole of fp32, or to 2^-149 where it is subnormal. NaN stays NaN.
//
//   exp_of(x)         exp_of(x, low) of x + low, where low is below 2^-3: the digits x cannot hold
//   exp2_of(x)        2^x for x <= 127, 0 below -126: softmax has no use for subnormal weights
//   logistic(z)       1 / (1 + exp(-z)) and 1 / (1 + exp(z)), each to its own last digits
//   tanh_of(x)        also near 0, where 1 - 2 / (exp(2x) + 1) cancels
//   normal(x)         (1 + erf(x / sqrt(2))) / 2, also far left, and exp(-x^2 / 2) / sqrt(2 pi)
//
// Source   exp, tanh: the polynomials of Cephes' expf and tanhf. normal: exp(t^2 / 2) P(-t) is
//          smooth from 1/2 to 1/(t sqrt(2 pi)); its rational fit is off by 7e-9 for 0 <= t <= 16.

constexpr float kMagic = 0x1.8p23f;  // a sum with it is rounded to a whole number, in its low bits

SWATHE_INLINE vf magnitude(vf x) { return floats_of(bits_of(x) & 0x7fffffff); }

// x * 2^count, for whole numbers -150 <= count <= 129; shifted = count + kMagic.
SWATHE_INLINE vf scaled(vf x, vf count, vf shifted) {
#if SWATHE_LANES == 16
  return (vf)_mm512_scalef_ps((__m512)x, (__m512)count);
#else
  // in two factors: neither is subnormal or infinite
  const vi whole = (vi)bits_of(shifted) - (vi)bits_of(all(kMagic)), half = whole >> 1;
  const vf first = floats_of((vu)((half + 127) << 23));
  return (x * first) * floats_of((vu)((whole - half + 127) << 23));
#endif
}

// exp(count * ln 2 + r), |r| < 1/2.
SWATHE_INLINE vf exp_from(vf count, vf shifted, vf r) {
  vf p = fma(r, 1.9875691500e-4f, 1.3981999507e-3f);
  p = fma(p, r, 8.3334519073e-3f);
  p = fma(p, r, 4.1665795894e-2f);
  p = fma(p, r, 1.6666665459e-1f);
  p = fma(p, r, 5.0000001201e-1f);
  return scaled(fma(p, r * r, r) + 1.0f, count, shifted);
}

// What is left of x without whole multiples of ln 2, in two parts: count times the first is exact.
SWATHE_INLINE vf reduced(vf x, vf count) {
  const vf r = fma(count, all(-0.693359375f), x);
  return fma(count, all(2.12194440e-4f), r);
}

SWATHE_INLINE vf exp_of(vf x) {
  // beyond, the result is infinite or 0
  x = at_least(at_most(x, 89.0f), -104.0f);
  const vf shifted = fma(x, 1.44269504088896341f, kMagic), count = shifted - kMagic;
  return exp_from(count, shifted, reduced(x, count));
}

SWATHE_INLINE vf exp_of(vf x, vf low) {
  x = at_least(at_most(x, 89.0f), -104.0f);
  const vf shifted = fma(x, 1.44269504088896341f, kMagic), count = shifted - kMagic;
  return exp_from(count, shifted, reduced(x, count) + low);
}

// 2^x to 2 units in the last place; 0 below -126, x <= 127.
SWATHE_INLINE vf exp2_of(vf x) {
  const vf shifted = x + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are x rounded
  const vf whole = shifted - 12582912.0f, f = x - whole;
  vf p = all(1.535336188319500e-4f);
  p = fma(p, f, all(1.339887440266574e-3f));
  p = fma(p, f, all(9.618437357674640e-3f));
  p = fma(p, f, all(5.550332471162809e-2f));
  p = fma(p, f, all(2.402264791363012e-1f));
  p = fma(p, f, all(6.931472028550421e-1f));
  p = fma(p, f, all(1.0f));
  const vf scaled = floats_of(bits_of(p) + (bits_of(shifted) << 23));
  return x < -126.0f ? vf{} : scaled;
}

SWATHE_INLINE void logistic(vf z, vf& at_z, vf& at_minus_z) {
  vf small = exp_of(-magnitude(z));
  const vf large = 1.0f / (1.0f + small);
  small *= large;
  at_z = z >= 0 ? large : small;
  at_minus_z = z >= 0 ? small : large;
}

SWATHE_INLINE vf tanh_of(vf x) {
  const vf square = x * x, size = magnitude(x);
  vf near = fma(square, -5.70498872745e-3f, 2.06390887954e-2f);
  near = fma(near, square, -5.37397155531e-2f);
  near = fma(near, square, 1.33314422036e-1f);
  near = fma(near, square, -3.33332819422e-1f);
  near = fma(near * square, x, x);
  const vf far = 1.0f - 2.0f / (exp_of(2.0f * size) + 1.0f);
  return size < 0.625f ? near : (x < 0 ? -far : far);
}

SWATHE_INLINE void normal(vf x, vf& area, vf& density) {
  const vf t = at_most(magnitude(x), 16.0f);
  // exp(-t^2 / 2): the square of the upper 12 bits is exact, what is left is small
  const vf head = floats_of(bits_of(t) & 0xfffff000);
  const vf bell = exp_of(-0.5f * head * head, -0.5f * (t - head) * (t + head));
  vf p = fma(t, 4.222085234e-3f, 4.134143516e-2f);
  p = fma(p, t, 1.853284389e-1f);
  p = fma(p, t, 4.411076903e-1f);
  p = fma(p, t, 0.5f);
  vf q = fma(t, 1.058310084e-2f, 1.036331505e-1f);
  q = fma(q, t, 4.749985933e-1f);
  q = fma(q, t, 1.211177468f);
  q = fma(q, t, 1.680100441f);
  q = fma(q, t, 1.0f);
  const vf tail = bell * (p / q);
  area = x < 0 ? tail : 1.0f - tail;
  density = bell * 0.398942280401432678f;
}
