// Attention forward of one block of rows, and of one part of a decoding row.

SWATHE_TARGET static void begin_rows(const Attention& a, const Block& at, bool sinks, Room& room) {
  for (int64_t r = 0; r < kRows; ++r) {
    const bool sink = sinks && a.sinks != nullptr && r < at.rows;
    room.max[r] = sink ? a.sinks[at.head_of(r)] * static_cast<float>(kLog2e) : -INFINITY;
    room.sum[r] = sink ? 1.0f : 0.0f;
  }
}

SWATHE_INLINE float lse2_of(float max, float sum) {
  return sum > 0.0f ? max + std::log2(sum) : -INFINITY;
}

// o^T[e][r] = sum_s v[s][e] p[s][r] over tiles of keys, rescaled when a row's maximum grows.
template <class X>
SWATHE_TARGET static void forward_block(const Attention& a, const Block& at, Room& room) {
  const int64_t vectors = vectors_of(at), width = vectors * lanes;
  const Span span = rows_see(a, at, room);
  begin_rows(a, at, true, room);
  pack<X>(a.q, a.q_at, at, a.D, factor_of(a), room.line, room.qT);
  std::memset(room.oT, 0, a.E * width * sizeof(float));
  for (int64_t s = span.begin / kKeys * kKeys; s < span.end; s += kKeys) {
    const int64_t n = std::min(kKeys, span.end - s);
    const Keys k = keys_at<X>(a, a.k, a.k_at, at.b, at.kv, s, n, a.D, false, room.keys);
    multiply({k.at, k.stride, 1, a.D, room.qT, width, room.sT, width, false}, n, vectors);
    finish_scores(a, at, span, s, n, room, room.sT, nullptr);
    if (weigh(room.sT, n, vectors, room)) {
      for (int64_t e = 0; e < a.E; ++e) {
        for (int64_t v = 0; v < width; v += lanes) {
          store(room.oT + e * width + v, load(room.oT + e * width + v) * load(room.alpha + v));
        }
      }
    }
    const Keys values = keys_at<X>(a, a.v, a.v_at, at.b, at.kv, s, n, a.E, false, room.values);
    multiply({values.at, 1, values.stride, n, room.sT, width, room.oT, width, true}, a.E, vectors);
  }
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t t = at.token(r), h = at.head_of(r);
    const float sum = room.sum[r], share = sum > 0.0f ? 1.0f / sum : 0.0f;
    for (int64_t e = 0; e < a.E; ++e) room.line[e] = room.oT[e * width + r] * share;
    X* out = static_cast<X*>(a.out) + at.b * a.o_at.b + h * a.o_at.h + t * a.o_at.t;
    narrow_row(room.line, out, a.E);
    a.lse[(at.b * a.H + h) * a.T + t] = lse2_of(room.max[r], sum);
  }
}

SWATHE_INLINE float sum_of(vf x) {
#if SWATHE_LANES == 16
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total = 0.0f;
  for (int lane = 0; lane < lanes; ++lane) total += x[lane];
  return total;
#endif
}

// Scores of few rows: each key is read once, features across.
template <class X>
SWATHE_TARGET static void dots(const Attention& a, const float* q, int64_t rows, const Keys& k,
                               int64_t n, int64_t width, float* z) {
  const int64_t D = padded(a.D), whole = a.D / lanes * lanes;
  for (int64_t i = 0; i < n; ++i) {
    const float* key = k.at + i * k.stride;
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = q + r * D;
      vf sums[2] = {};
      int64_t d = 0;
      for (; d + 2 * lanes <= whole; d += 2 * lanes) {
        sums[0] = fma(load(key + d), load(row + d), sums[0]);
        sums[1] = fma(load(key + d + lanes), load(row + d + lanes), sums[1]);
      }
      if (d < whole) sums[0] = fma(load(key + d), load(row + d), sums[0]);
      if (whole < a.D) {
        const int64_t rest = a.D - whole;
        sums[1] = fma(load_part(key + whole, rest), load_part(row + whole, rest), sums[1]);
      }
      z[i * width + r] = sum_of(sums[0] + sums[1]);
    }
  }
}

// Keys [begin, end) of the rows of `at`, at most one vector of them.
template <class X>
SWATHE_TARGET static void decode_part(const Attention& a, const Block& at, int64_t begin,
                                      int64_t end, const Part& part, Room& room) {
  const int64_t width = lanes, D = padded(a.D), E = padded(a.E);
  const Span span = rows_see(a, at, room);
  begin_rows(a, at, begin == 0, room);
  rows_of<X>(a.q, a.q_at, at, a.D, D, room.qT);
  for (int64_t i = 0; i < at.rows * D; ++i) room.qT[i] *= factor_of(a);
  std::memset(room.oT, 0, at.rows * E * sizeof(float));
  std::memset(room.sT, 0, kKeys * width * sizeof(float));
  const int64_t stop = std::min(end, span.end);
  for (int64_t s = std::max(begin, span.begin); s < stop; s += kKeys) {
    const int64_t n = std::min(kKeys, stop - s);
    const Keys k = keys_at<X>(a, a.k, a.k_at, at.b, at.kv, s, n, a.D, false, room.keys);
    dots<X>(a, room.qT, at.rows, k, n, width, room.sT);
    finish_scores(a, at, span, s, n, room, room.sT, nullptr);
    if (weigh(room.sT, n, 1, room)) {
      for (int64_t r = 0; r < at.rows; ++r) {
        for (int64_t e = 0; e < E; e += lanes) {
          store(room.oT + r * E + e, load(room.oT + r * E + e) * room.alpha[r]);
        }
      }
    }
    const Keys v = keys_at<X>(a, a.v, a.v_at, at.b, at.kv, s, n, a.E, true, room.values);
    const int64_t columns = (a.E + lanes - 1) / lanes;
    multiply({room.sT, 1, width, n, v.at, v.stride, room.oT, E, true}, at.rows, columns);
  }
  for (int64_t r = 0; r < at.rows; ++r) {
    part.max[r] = room.max[r];
    part.sum[r] = room.sum[r];
    std::memcpy(part.o + r * a.E, room.oT + r * E, a.E * sizeof(float));
  }
}

// o and lse of the rows of `at` from their `count` parts, in order.
template <class X>
SWATHE_TARGET static void join_parts(const Attention& a, const Block& at, const Part* parts,
                                     int64_t count, Room& room) {
  for (int64_t r = 0; r < at.rows; ++r) {
    float most = -INFINITY, total = 0.0f;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, parts[i].max[r]);
    std::memset(room.line, 0, a.E * sizeof(float));
    for (int64_t i = 0; i < count; ++i) {
      const float weight = most == -INFINITY ? 0.0f : std::exp2(parts[i].max[r] - most);
      if (weight == 0.0f) continue;
      total += parts[i].sum[r] * weight;
      for (int64_t e = 0; e < a.E; ++e) room.line[e] += parts[i].o[r * a.E + e] * weight;
    }
    const float share = total > 0.0f ? 1.0f / total : 0.0f;
    for (int64_t e = 0; e < a.E; ++e) room.line[e] *= share;
    const int64_t t = at.token(r), h = at.head_of(r);
    narrow_row(room.line, static_cast<X*>(a.out) + at.b * a.o_at.b + h * a.o_at.h + t * a.o_at.t,
               a.E);
    a.lse[(at.b * a.H + h) * a.T + t] = lse2_of(most, total);
  }
}
