// C[i][n] (+)= sum_k A[i * ai + k * ak] * B[k][n], with n in vectors: the product that all parts of
// attention are written as. Included in bodies, hence no include guard.
//
// A tile of kTile x 3 vectors stays in registers: 24 sums with AVX-512, 12 with 16 registers. Sums
// run over k in order, in fp32, from zero; what C held is added at the end, so that long sums made
// of several calls are summed in two levels.

constexpr int kTile = SWATHE_LANES == 16 ? 8 : 4;
constexpr int kVectors = 3;

SWATHE_INLINE vf fma(vf a, vf b, vf c) {
#if SWATHE_LANES == 16
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif SWATHE_LANES == 8
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

SWATHE_INLINE vf all(float value) { return value - vf{}; }

struct Product {
  const float* A;
  int64_t ai, ak, K;
  const float* B;
  int64_t ldb;
  float* C;
  int64_t ldc;
  bool add;
};

template <int I, int N>
SWATHE_INLINE void product_tile(const Product& p, int64_t i0, int64_t n0) {
  vf sums[I][N] = {};
  const float *a = p.A + i0 * p.ai, *b = p.B + n0 * lanes;
  for (int64_t k = 0; k < p.K; ++k, a += p.ak, b += p.ldb) {
    vf columns[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) columns[n] = load(b + n * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      const vf row = all(a[i * p.ai]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[i][n] = fma(row, columns[n], sums[i][n]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float* c = p.C + (i0 + i) * p.ldc + (n0 + n) * lanes;
      store(c, p.add ? load(c) + sums[i][n] : sums[i][n]);
    }
  }
}

template <int N>
SWATHE_TARGET static void product_columns(const Product& p, int64_t M, int64_t n0) {
  int64_t i = 0;
  for (; i + kTile <= M; i += kTile) product_tile<kTile, N>(p, i, n0);
  if (kTile > 4 && i + 4 <= M) {
    product_tile<4, N>(p, i, n0);
    i += 4;
  }
  if (i + 2 <= M) {
    product_tile<2, N>(p, i, n0);
    i += 2;
  }
  if (i < M) product_tile<1, N>(p, i, n0);
}

// M rows and `vectors` vectors of columns.
SWATHE_TARGET static void multiply(const Product& p, int64_t M, int64_t vectors) {
  int64_t n = 0;
  for (; n + kVectors <= vectors; n += kVectors) product_columns<kVectors>(p, M, n);
  if (n + 2 == vectors) product_columns<2>(p, M, n);
  if (n + 1 == vectors) product_columns<1>(p, M, n);
}
