// Attention forward of one block of rows.

SWATHE_TARGET static void begin_rows(const Attention& a, const Block& at, bool sinks, Room& room) {
  for (int64_t r = 0; r < kRows; ++r) {
    const bool sink = sinks && a.sinks != nullptr && r < at.rows;
    room.max[r] = sink ? a.sinks[at.head_of(r)] * static_cast<float>(kLog2e) : -INFINITY;
    room.sum[r] = sink ? 1.0f : 0.0f;
  }
}

SWATHE_INLINE float lse2_of(float max, float sum) {
  return sum == 0.0f ? -INFINITY : max + std::log2(sum);
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
    const Keys k = keys_at<X>(a, a.k, a.k_at, at.b, at.kv, s, n, a.D, room.keys);
    multiply<float>({k.at, k.stride, 1, a.D, room.qT, width, room.sT, width, false}, n, vectors);
    finish_scores(a, at, span, s, n, room, room.sT, nullptr);
    if (weigh(room.sT, n, vectors, room)) {
      for (int64_t e = 0; e < a.E; ++e) {
        for (int64_t v = 0; v < width; v += lanes) {
          store(room.oT + e * width + v, load(room.oT + e * width + v) * load(room.alpha + v));
        }
      }
    }
    const Keys values = keys_at<X>(a, a.v, a.v_at, at.b, at.kv, s, n, a.E, room.values);
    multiply<float>({values.at, 1, values.stride, n, room.sT, width, room.oT, width, true}, a.E,
                    vectors);
  }
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t t = at.token(r), h = at.head_of(r);
    const float sum = room.sum[r], share = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int64_t e = 0; e < a.E; ++e) room.line[e] = room.oT[e * width + r] * share;
    X* out = static_cast<X*>(a.o) + at.b * a.o_at.b + h * a.o_at.h + t * a.o_at.t;
    narrow_row(room.line, out, a.E);
    a.lse[(at.b * a.H + h) * a.T + t] = lse2_of(room.max[r], sum);
  }
}
