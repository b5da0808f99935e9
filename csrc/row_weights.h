// Weights of rows, widened once, and the sums of their gradients over blocks of rows (blocks.h);
// for the bodies of ops, after row_loops.h.

// offset + the weight in fp32, once for all rows; `absent` where there is no weight.
static void prepare(const void* weight, int64_t type, float offset, float absent, float* to,
                    int64_t N) {
  if (weight == nullptr) {
    std::fill_n(to, N, absent);
    return;
  }
  with_type(type, [&](auto t) {
    widen_row(static_cast<const decltype(t)*>(weight), to, N, offset);
  });
}

// total += value, with what rounding lost kept in `lost` (Kahan): the sum of many blocks stays as
// exact as that of one.
SWATHE_INLINE void add(vf& total, vf& lost, vf value) {
  const vf wanted = value - lost, reached = total + wanted;
  lost = (reached - total) - wanted;
  total = reached;
}

template <class T>
struct SumBlocks {
  const float* partial;
  int64_t blocks, N;
  T* out;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w) const {
    vf total = {}, lost = {};
    for (int64_t block = 0; block < blocks; ++block) {
      add(total, lost, load(partial + block * N + n, w));
    }
    store(out + n, total, w);
  }
};

template <class T>
SWATHE_TARGET static void sum_blocks(const float* partial, int64_t blocks, T* out, int64_t N) {
  each_column(N, SumBlocks<T>{partial, blocks, N, out});
}

// The gradient of a weight: the sum over the blocks of rows, in their order.
static void finish(const float* partial, int64_t blocks, int64_t type, void* out, int64_t N) {
  with_type(type, [&](auto t) {
    sum_blocks(partial, blocks, static_cast<decltype(t)*>(out), N);
  });
}
