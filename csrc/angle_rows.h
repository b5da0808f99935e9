// Angles of a token and the turning of a head, for the bodies of ops; after row_loops.h.
//
//   y1, y2 = x1 * c1 - x2 * s1,  x2 * c2 + x1 * s2        for each pair (x1, x2) of a head
//
// A token's angles are gathered once, in fp32 and in the order of the features they meet, and serve
// all its heads.

// Where one axis of a token's angles stands in the tables.
SWATHE_INLINE int64_t row_of(const Turning& a, int64_t axis, int64_t b, int64_t s) {
  const int64_t at = axis * a.axis_stride + b * a.batch_stride + s * a.token_stride;
  return a.positions == nullptr ? at : position_at(a, at) * a.row_stride;
}

// The token's row of one table, widened; with mrope each section of pairs comes from its own axis.
template <class T>
SWATHE_TARGET static void gather(const Turning& a, const T* table, int64_t b, int64_t s,
                                 float* to) {
  const int64_t half = a.R / 2;
  if (!a.mrope) return widen_row(table + row_of(a, 0, b, s), to, a.form == kCompact ? half : a.R);
  const int64_t edges[4] = {0, a.h_start, a.w_start, half};
  for (int64_t axis = 0; axis < 3; ++axis) {
    const T* row = table + row_of(a, axis, b, s);
    const int64_t first = edges[axis], count = edges[axis + 1] - first;
    if (a.form == kPairs) {
      widen_row(row + 2 * first, to + 2 * first, 2 * count);
    } else {
      widen_row(row + first, to + first, count);
      if (a.form == kHalves) widen_row(row + half + first, to + half + first, count);
    }
  }
}

// c and s (R each) as features meet them: s of a first member negated, for a gradient exchanged.
SWATHE_TARGET static void angles(const Turning& a, bool back, int64_t b, int64_t s, float* c,
                                 float* sines) {
  with_type(a.table_type, [&](auto t) {
    gather(a, static_cast<const decltype(t)*>(a.cos), b, s, c);
    gather(a, static_cast<const decltype(t)*>(a.sin), b, s, sines);
  });
  const int64_t half = a.R / 2;
  if (a.form == kCompact && a.interleaved) {
    for (int64_t i = half - 1; i >= 0; --i) {
      c[2 * i] = c[2 * i + 1] = c[i];
      sines[2 * i] = sines[2 * i + 1] = sines[i];
    }
  } else if (a.form == kCompact) {
    std::memcpy(c + half, c, half * sizeof(float));
    std::memcpy(sines + half, sines, half * sizeof(float));
  }
  const int64_t stride = a.interleaved ? 2 : 1, other = a.interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    float& first = sines[stride * i];
    float& second = sines[stride * i + other];
    const float s1 = first, s2 = second;
    first = back ? s2 : -s1;
    second = back ? -s1 : s2;
  }
}

template <class X, bool kRound>
SWATHE_INLINE vf turned(vf x, vf partner, vf c, vf s) {
  if (!kRound) return x * c + partner * s;
  return rounded(x * c, X{}) + rounded(partner * s, X{});
}

// Neighbours exchanged: a 64-bit lane holds a pair.
SWATHE_INLINE vf exchanged(vf x) {
  const vu bits = bits_of(x);
  vq pairs;
  std::memcpy(&pairs, &bits, sizeof pairs);
  pairs = (pairs >> 32) | (pairs << 32);
  vf out;
  std::memcpy(&out, &pairs, sizeof out);
  return out;
}

template <class X, bool kRound, class From, class To>
struct TurnPairs {
  const From* x;
  To* y;
  const float *c, *s;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w) const {
    const vf v = load(x + n, w);
    store(y + n, turned<X, kRound>(v, exchanged(v), load(c + n, w), load(s + n, w)), w);
  }
};

template <class X, bool kRound, class From, class To>
struct TurnHalves {
  const From* x;
  To* y;
  const float *c, *s;
  int64_t half;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w) const {
    const int64_t other = half + n;
    const vf x1 = load(x + n, w), x2 = load(x + other, w);
    store(y + n, turned<X, kRound>(x1, x2, load(c + n, w), load(s + n, w)), w);
    store(y + other, turned<X, kRound>(x2, x1, load(c + other, w), load(s + other, w)), w);
  }
};

// The first R features of a head; kRound rounds each product to X first, as HF's eager code does.
template <class X, bool kRound, bool kInterleaved, class From, class To>
SWATHE_INLINE void turn(const From* x, To* y, const float* c, const float* s, int64_t R) {
  if (kInterleaved) {
    each_column(R, TurnPairs<X, kRound, From, To>{x, y, c, s});
  } else {
    each_column(R / 2, TurnHalves<X, kRound, From, To>{x, y, c, s, R / 2});
  }
}
