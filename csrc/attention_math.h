// exp2 and tanh of vectors; the coefficients are those of the Cephes library's exp2f and tanhf.

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

SWATHE_INLINE vf tanh_of(vf x) {
  const vf square = x * x;
  vf p = all(-5.70498872745e-3f);
  p = fma(p, square, all(2.06390887954e-2f));
  p = fma(p, square, all(-5.37397155531e-2f));
  p = fma(p, square, all(1.33314422036e-1f));
  p = fma(p, square, all(-3.33332819422e-1f));
  const vf small = fma(p * square, x, x);
  const vf size = floats_of(bits_of(x) & 0x7fffffff);
  const vf capped = size < 20.0f ? size : all(20.0f);
  const vf e = exp2_of(capped * 2.885390081777927f);
  const vf large = 1.0f - 2.0f / (e + 1.0f);
  return size < 0.625f ? small : floats_of(bits_of(large) | (bits_of(x) & 0x80000000));
}
