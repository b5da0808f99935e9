// C[i][n] (+)= sum_k A[i * ai + k * ak] * B[k][n], with n in vectors: the product that all parts of
// attention are written as. Included in bodies, hence no include guard.
//
// A tile of 6 x kVectors stays in registers: 24 sums with AVX-512, 12 with 16 registers. Sums
// are fp32 and run over kChain terms in order before they are added to C: one long chain of
// additions would lose more than eager's blocked products do.

constexpr int kTile = 6;
constexpr int kVectors = SWATHE_LANES == 16 ? 4 : 2;
constexpr int64_t kChain = 32;

template <class Y = float>
struct Product {
  const float* A;
  int64_t ai, ak, K;
  const Y* B;
  int64_t ldb;
  float* C;
  int64_t ldc;
  bool add;
};

template <int I, int N, class Y>
SWATHE_INLINE void product_tile(const Product<Y>& p, int64_t i0, int64_t n0) {
  vf sums[I][N] = {};
  const float* a = p.A + i0 * p.ai;
  const Y* b = p.B + n0 * lanes;
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

template <int N, class Y>
SWATHE_TARGET static void product_columns(const Product<Y>& p, int64_t M, int64_t n0) {
  int64_t i = 0;
  for (; i + kTile <= M; i += kTile) product_tile<kTile, N>(p, i, n0);
  switch (M - i) {
    case 5:
      return product_tile<5, N>(p, i, n0);
    case 4:
      return product_tile<4, N>(p, i, n0);
    case 3:
      return product_tile<3, N>(p, i, n0);
    case 2:
      return product_tile<2, N>(p, i, n0);
    case 1:
      return product_tile<1, N>(p, i, n0);
  }
}

// The product over at most kChain terms.
template <class Y>
SWATHE_TARGET static void multiply_part(const Product<Y>& p, int64_t M, int64_t vectors) {
  int64_t n = 0;
  for (; n + kVectors <= vectors; n += kVectors) product_columns<kVectors>(p, M, n);
  if (n + 3 == vectors) product_columns<3>(p, M, n);
  if (n + 2 == vectors) product_columns<2>(p, M, n);
  if (n + 1 == vectors) product_columns<1>(p, M, n);
}

// M rows and `vectors` vectors of columns.
template <class Y = float>
SWATHE_TARGET static void multiply(const Product<Y>& whole, int64_t M, int64_t vectors) {
  Product<Y> part = whole;
  for (int64_t k = 0; k < whole.K; k += kChain) {
    part.K = std::min(kChain, whole.K - k);
    part.A = whole.A + k * whole.ak;
    part.B = whole.B + k * whole.ldb;
    multiply_part(part, M, vectors);
    part.add = true;
  }
}
