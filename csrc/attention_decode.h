// Decoding: few rows against many keys. Each key is read once, features across; scores are rows
// down and keys across, in tiles of kKeys, so that a softmax uses whole vectors.

SWATHE_INLINE float max_of(vf x) {
#if SWATHE_LANES == 16
  return _mm512_reduce_max_ps((__m512)x);
#else
  float most = x[0];
  for (int lane = 1; lane < lanes; ++lane) most = most > x[lane] ? most : x[lane];
  return most;
#endif
}

// Products of one key with R rows, `width` floats apart, as vectors still to be summed.
template <int R, class Y>
SWATHE_INLINE void dot(const Y* key, const float* q, int64_t width, int64_t D, vf* sums) {
  vf found[R] = {};
  int64_t d = 0;
  for (; d + lanes <= D; d += lanes) {
    const vf k = load(key + d);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) found[r] = fma(k, load(q + r * width + d), found[r]);
  }
  if (d < D) {
    const vf k = load_part(key + d, D - d);
    for (int r = 0; r < R; ++r) found[r] = fma(k, load(q + r * width + d), found[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) sums[r * lanes] = found[r];
}

// z[r][i] = q[r] . k[i] for R rows and n keys; rows of z are kKeys apart.
template <int R, class Y>
SWATHE_INLINE void dots_of(const Y* k, int64_t stride, int64_t n, const float* q, int64_t width,
                           int64_t D, float* z) {
  for (int64_t i = 0; i < n; i += lanes) {
    vf sums[R * lanes] = {};
    const int64_t count = std::min<int64_t>(lanes, n - i);
    for (int64_t j = 0; j < count; ++j) dot<R>(k + (i + j) * stride, q, width, D, sums + j);
    for (int r = 0; r < R; ++r) store(z + r * kKeys + i, sums_of(sums + r * lanes));
  }
}

template <class Y>
SWATHE_TARGET static void dots(const Y* k, int64_t stride, int64_t n, const float* q, int64_t rows,
                               int64_t width, int64_t D, float* z) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    dots_of<4>(k, stride, n, q + r * width, width, D, z + r * kKeys);
  }
  q += r * width;
  z += r * kKeys;
  if (r + 3 == rows) dots_of<3>(k, stride, n, q, width, D, z);
  if (r + 2 == rows) dots_of<2>(k, stride, n, q, width, D, z);
  if (r + 1 == rows) dots_of<1>(k, stride, n, q, width, D, z);
}

// What `finish_scores` does, for row r of keys s .. s + n; past them z is -inf.
SWATHE_TARGET static void finish_row(const Attention& a, const Block& at, int64_t r, int64_t s,
                                     int64_t n, const Room& room, float* z) {
  if (a.softcap != 0.0) {
    const float cap = static_cast<float>(a.softcap * kLog2e);
    for (int64_t i = 0; i < n; i += lanes) store(z + i, tanh_of(load(z + i)) * cap);
  }
  const int64_t t = at.token(r), h = at.head_of(r);
  for (int64_t i = 0; a.alibi != nullptr && i < n; ++i) {
    z[i] += room.slope[r] * (static_cast<float>(s + i) - room.place[r]);
  }
  if (a.bias != nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      const float bias = bias_at(a, at.b, h, t, s + i);
      z[i] = bias > static_cast<float>(a.lowest) ? z[i] + bias * static_cast<float>(kLog2e)
                                                 : -INFINITY;
    }
  }
  const bool dense = a.allowed != nullptr || a.keys != nullptr;
  for (int64_t i = 0; dense && i < n; ++i) {
    if (!shown(a, at.b, h, t, s + i)) z[i] = -INFINITY;
  }
  const int64_t first = std::min<int64_t>(room.first[r] - s, n);
  const int64_t last = std::max<int64_t>(std::min<int64_t>(room.last[r] - s, n), 0);
  for (int64_t i = 0; i < first; ++i) z[i] = -INFINITY;
  for (int64_t i = last; i < (n + lanes - 1) / lanes * lanes; ++i) z[i] = -INFINITY;
}

// Weights of one row against its new maximum; returns what its earlier ones are multiplied by.
SWATHE_TARGET static float weigh_row(float* z, int64_t n, float& max, float& sum) {
  vf most = all(max);
  for (int64_t i = 0; i < n; i += lanes) {
    const vf score = load(z + i);
    most = most > score ? most : score;
  }
  const float now = max_of(most), base = now == -INFINITY ? 0.0f : now;
  vf total = {};
  for (int64_t i = 0; i < n; i += lanes) {
    const vf weight = exp2_of(load(z + i) - base);
    store(z + i, weight);
    total += weight;
  }
  const float alpha = exp2_of(all(max - base))[0];
  sum = sum * alpha + sum_of(total);
  max = now;
  return alpha;
}

// Adds keys s .. s + n, whose rows are at k and v, to o (rows, E) of `room`.
template <class Y>
SWATHE_TARGET static void decode_tile(const Attention& a, const Block& at, int64_t s, int64_t n,
                                      const Y* k, int64_t k_stride, const Y* v, int64_t v_stride,
                                      Room& room) {
  const int64_t E = padded(a.E);
  dots(k, k_stride, n, room.qT, at.rows, padded(a.D), a.D, room.sT);
  for (int64_t r = 0; r < at.rows; ++r) {
    float *z = room.sT + r * kKeys, *o = room.oT + r * E;
    finish_row(a, at, r, s, n, room, z);
    const float alpha = weigh_row(z, n, room.max[r], room.sum[r]);
    if (alpha == 1.0f) continue;
    for (int64_t e = 0; e < E; e += lanes) store(o + e, load(o + e) * alpha);
  }
  const int64_t whole = a.E / lanes;
  multiply<Y>({room.sT, kKeys, 1, n, v, v_stride, room.oT, E, true}, at.rows, whole);
  for (int64_t e = whole * lanes; e < a.E; ++e) {
    for (int64_t r = 0; r < at.rows; ++r) {
      float total = 0.0f;
      for (int64_t i = 0; i < n; ++i) {
        total += room.sT[r * kKeys + i] * load_part(v + i * v_stride + e, 1)[0];
      }
      room.oT[r * E + e] += total;
    }
  }
}

// Keys [begin, end) of the rows of `at`.
template <class X>
SWATHE_TARGET static void decode_part(const Attention& a, const Block& at, int64_t begin,
                                      int64_t end, const RowsPart& part, Room& room) {
  const int64_t D = padded(a.D), E = padded(a.E);
  const Span span = rows_see(a, at, room);
  begin_rows(a, at, begin == 0, room);
  rows_of<X>(a.q, a.q_at, at, a.D, D, room.qT);
  for (int64_t i = 0; i < at.rows * D; ++i) room.qT[i] *= factor_of(a);
  std::memset(room.oT, 0, at.rows * E * sizeof(float));
  const int64_t stop = std::min(end, span.end);
  for (int64_t s = std::max(begin, span.begin); s < stop; s += kKeys) {
    const int64_t n = std::min(kKeys, stop - s);
    if (a.table == nullptr) {
      const X* k = row_at<X>(a.k, a.k_at, at.b, at.kv, s);
      const X* v = row_at<X>(a.v, a.v_at, at.b, at.kv, s);
      decode_tile(a, at, s, n, k, a.k_at.t, v, a.v_at.t, room);
    } else {
      const Keys k = keys_at<X>(a, a.k, a.k_at, at.b, at.kv, s, n, a.D, room.keys);
      const Keys v = keys_at<X>(a, a.v, a.v_at, at.b, at.kv, s, n, a.E, room.values);
      decode_tile(a, at, s, n, k.at, k.stride, v.at, v.stride, room);
    }
  }
  for (int64_t r = 0; r < at.rows; ++r) {
    part.max[r] = room.max[r];
    part.sum[r] = room.sum[r];
    std::memcpy(part.o + r * a.E, room.oT + r * E, a.E * sizeof(float));
  }
}

// o and lse of the rows of `at` from their `count` parts, in order.
template <class X>
SWATHE_TARGET static void join_parts(const Attention& a, const Block& at, const RowsPart* parts,
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
    const float share = total == 0.0f ? 0.0f : 1.0f / total;
    for (int64_t e = 0; e < a.E; ++e) room.line[e] *= share;
    const int64_t t = at.token(r), h = at.head_of(r);
    narrow_row(room.line, static_cast<X*>(a.o) + at.b * a.o_at.b + h * a.o_at.h + t * a.o_at.t,
               a.E);
    a.lse[(at.b * a.H + h) * a.T + t] = lse2_of(most, total);
  }
}
