// Attention's gradients: dq and the rows' statistics of one block, dk and dv of kSuper keys, dbias.
//
//   p = exp2(z - lse2)     dz = p * (do v^T - delta)     ds = dz * slope of the softcap
//   dq = scale * ds k     dk = scale * ds^T q     dv = p^T do     dbias = dz

// The rows of a block, packed for scores and for do v^T, with lse2 and delta as `stats` has them.
template <class X>
SWATHE_TARGET static Span gradient_rows(const Attention& a, const Block& at, Room& room) {
  const Span span = rows_see(a, at, room);
  pack<X>(a.q, a.q_at, at, a.D, factor_of(a), room.line, room.qT);
  pack<X>(a.dO, a.do_at, at, a.E, 1.0f, room.line, room.doT);
  for (int64_t r = 0; r < kRows; ++r) room.lse[r] = room.delta[r] = 0.0f;
  for (int64_t r = 0; r < at.rows; ++r) {
    const float* stats = a.stats + (at.b * a.H + at.head_of(r)) * 2 * a.span + at.token(r);
    room.lse[r] = stats[0];
    room.delta[r] = stats[a.span];
  }
  return span;
}

// p of keys s .. s + n in sT, and dz in pT, times the softcap's slope if asked for.
template <class X>
SWATHE_TARGET static void gradient_tile(const Attention& a, const Block& at, const Span& span,
                                        int64_t s, int64_t n, const Keys& k, bool sloped,
                                        Room& room) {
  const int64_t vectors = vectors_of(at), width = vectors * lanes;
  float* slopes = sloped && a.softcap != 0.0 ? room.slopes : nullptr;
  multiply<float>({k.at, k.stride, 1, a.D, room.qT, width, room.sT, width, false}, n, vectors);
  finish_scores(a, at, span, s, n, room, room.sT, slopes);
  const Keys v = keys_at<X>(a, a.v, a.v_at, at.b, at.kv, s, n, a.E, room.values);
  multiply<float>({v.at, v.stride, 1, a.E, room.doT, width, room.pT, width, false}, n, vectors);
  for (int64_t i = 0; i < n * width; i += width) {
    for (int64_t c = 0; c < width; c += lanes) {
      const vf p = exp2_of(load(room.sT + i + c) - load(room.lse + c));
      vf dz = p * (load(room.pT + i + c) - load(room.delta + c));
      if (slopes != nullptr) dz *= load(slopes + i + c);
      // where p is 0, do v^T may be anything
      store(room.pT + i + c, p == 0.0f ? vf{} : dz);
      store(room.sT + i + c, p);
    }
  }
}

// stats[b, h] is lse2, inf where a row sees nothing, and delta = sum_e do o - dlse.
template <class X>
SWATHE_TARGET static void statistics(const Attention& a, const Block& at, Room& room) {
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t t = at.token(r), h = at.head_of(r), row = (at.b * a.H + h) * a.T + t;
    widen_row(row_at<X>(a.o, a.o_at, at.b, h, t), 1.0f, room.line, a.E);
    const X* dO = row_at<X>(a.dO, a.do_at, at.b, h, t);
    vd total = {};
    int64_t e = 0;
    for (; e + lanes <= a.E; e += lanes) total += doubles(load(dO + e) * load(room.line + e));
    if (e < a.E) {
      total += doubles(load_part(dO + e, a.E - e) * load_part(room.line + e, a.E - e));
    }
    const float lse = a.lse[row];
    // what arrives is the gradient of lse2
    const float dlse = a.dlse != nullptr ? a.dlse[row] * static_cast<float>(kLog2e) : 0.0f;
    float* stats = a.stats + (at.b * a.H + h) * 2 * a.span + t;
    stats[0] = lse == -INFINITY ? INFINITY : lse;
    stats[a.span] = static_cast<float>(sum(total)) - dlse;
  }
}

template <class X>
SWATHE_TARGET static void backward_rows(const Attention& a, const Block& at, Room& room) {
  const int64_t vectors = vectors_of(at), width = vectors * lanes;
  const float scale = static_cast<float>(a.scale);
  statistics<X>(a, at, room);
  const Span span = gradient_rows<X>(a, at, room);
  std::memset(room.oT, 0, a.D * width * sizeof(float));
  for (int64_t s = span.begin / kKeys * kKeys; s < span.end; s += kKeys) {
    const int64_t n = std::min(kKeys, span.end - s);
    const Keys k = keys_at<X>(a, a.k, a.k_at, at.b, at.kv, s, n, a.D, room.keys);
    gradient_tile<X>(a, at, span, s, n, k, true, room);
    multiply<float>({k.at, 1, k.stride, n, room.pT, width, room.oT, width, true}, a.D, vectors);
  }
  for (int64_t r = 0; r < at.rows; ++r) {
    for (int64_t d = 0; d < a.D; ++d) room.line[d] = room.oT[d * width + r] * scale;
    X* dq = static_cast<X*>(a.dq) + at.b * a.dq_at.b + at.head_of(r) * a.dq_at.h;
    narrow_row(room.line, dq + at.token(r) * a.dq_at.t, a.D);
  }
}

// dk and dv of keys [begin, end), at most kSuper, summed over the rows of a group in their order.
template <class X>
SWATHE_TARGET static void backward_keys(const Attention& a, int64_t b, int64_t kv, int64_t begin,
                                        int64_t end, Room& room) {
  const int64_t D = padded(a.D), E = padded(a.E), group = a.H / a.K, rows = a.T * group;
  std::memset(room.dk, 0, (end - begin) * D * sizeof(float));
  std::memset(room.dv, 0, (end - begin) * E * sizeof(float));
  for (int64_t row = 0; row < rows; row += kRows) {
    const Block at = {b, kv, kv * group, group, row, std::min(kRows, rows - row)};
    const int64_t width = vectors_of(at) * lanes;
    const Span seen = rows_see(a, at, room);
    if (seen.begin >= end || seen.end <= begin) continue;
    const Span span = gradient_rows<X>(a, at, room);
    rows_of<X>(a.q, a.q_at, at, a.D, D, room.rows_q);
    rows_of<X>(a.dO, a.do_at, at, a.E, E, room.rows_do);
    for (int64_t s = begin; s < end; s += kKeys) {
      const int64_t n = std::min({kKeys, end - s, span.end - s});
      if (n <= 0 || s + n <= span.begin) continue;
      const Keys k = keys_at<X>(a, a.k, a.k_at, b, kv, s, n, a.D, room.keys);
      gradient_tile<X>(a, at, span, s, n, k, true, room);
      float *dk = room.dk + (s - begin) * D, *dv = room.dv + (s - begin) * E;
      multiply<float>({room.pT, width, 1, at.rows, room.rows_q, D, dk, D, true}, n, D / lanes);
      multiply<float>({room.sT, width, 1, at.rows, room.rows_do, E, dv, E, true}, n, E / lanes);
    }
  }
  const float scale = static_cast<float>(a.scale);
  for (int64_t s = begin; s < end; ++s) {
    float *dk = room.dk + (s - begin) * D, *dv = room.dv + (s - begin) * E;
    for (int64_t d = 0; d < a.D; ++d) dk[d] *= scale;
    narrow_row(dk, static_cast<X*>(a.dk) + b * a.dk_at.b + kv * a.dk_at.h + s * a.dk_at.t, a.D);
    narrow_row(dv, static_cast<X*>(a.dv) + b * a.dv_at.b + kv * a.dv_at.h + s * a.dv_at.t, a.E);
  }
}

// Adds one block's dz to `total`: (rows or 1) x (S or 1) floats, as the bias's sizes say.
template <class X>
SWATHE_TARGET static void bias_block(const Attention& a, const Block& at, float* total,
                                     Room& room) {
  const int64_t width = vectors_of(at) * lanes;
  const int64_t by_row = a.bias_size[2] > 1 ? (a.bias_size[3] > 1 ? a.S : 1) : 0;
  const int64_t by_key = a.bias_size[3] > 1 ? 1 : 0;
  const Span span = gradient_rows<X>(a, at, room);
  for (int64_t s = span.begin / kKeys * kKeys; s < span.end; s += kKeys) {
    const int64_t n = std::min(kKeys, span.end - s);
    const Keys k = keys_at<X>(a, a.k, a.k_at, at.b, at.kv, s, n, a.D, room.keys);
    gradient_tile<X>(a, at, span, s, n, k, false, room);
    for (int64_t r = 0; r < at.rows; ++r) {
      for (int64_t i = 0; i < n; ++i) {
        total[r * by_row + (s + i) * by_key] += room.pT[i * width + r];
      }
    }
  }
}

// dbias of batch `b` and head `h` of the bias, and of tokens from `token` on where it has rows.
template <class X>
SWATHE_TARGET static void backward_bias(const Attention& a, int64_t b, int64_t h, int64_t token,
                                        float* total, Room& room) {
  const int64_t rows = a.bias_size[2] > 1 ? std::min(kRows, a.T - token) : 1;
  const int64_t columns = a.bias_size[3] > 1 ? a.S : 1;
  std::memset(total, 0, rows * columns * sizeof(float));
  const int64_t stop = a.bias_size[2] > 1 ? token + rows : a.T;
  for (int64_t batch = 0; batch < a.B; ++batch) {
    if (a.bias_size[0] > 1 && batch != b) continue;
    for (int64_t head = 0; head < a.H; ++head) {
      if (a.bias_size[1] > 1 && head != h) continue;
      for (int64_t t = token; t < stop; t += kRows) {
        const Block at = {batch, head / (a.H / a.K), head, 1, t, std::min(kRows, stop - t)};
        bias_block<X>(a, at, total, room);
      }
    }
  }
  const int64_t plane = (b * a.bias_size[1] + h) * a.bias_size[2] * a.bias_size[3];
  const int64_t at = plane + (a.bias_size[2] > 1 ? token * a.bias_size[3] : 0);
  if (a.bias_type == kFloat32) {
    narrow_row(total, static_cast<float*>(a.dbias) + at, rows * columns);
  } else if (a.bias_type == kBFloat16) {
    narrow_row(total, static_cast<bf16*>(a.dbias) + at, rows * columns);
  } else {
    narrow_row(total, static_cast<f16*>(a.dbias) + at, rows * columns);
  }
}
