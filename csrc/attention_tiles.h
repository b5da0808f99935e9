// Tiles of scores, keys down and query rows across, so that a row's softmax needs no sum across a
// vector: z[s][r] in units of log 2, -inf where row r does not see key s.

SWATHE_INLINE int64_t vectors_of(const Block& at) { return (at.rows + lanes - 1) / lanes; }

// One row of a tensor that is read.
template <class X>
SWATHE_INLINE const X* row_at(const void* base, const Strides& by, int64_t b, int64_t h,
                              int64_t t) {
  return static_cast<const X*>(base) + b * by.b + h * by.h + t * by.t;
}

template <class X>
SWATHE_TARGET static void widen_row(const X* from, float factor, float* to, int64_t count) {
  int64_t n = 0;
  for (; n + lanes <= count; n += lanes) store(to + n, load(from + n) * factor);
  if (n < count) store_part(to + n, load_part(from + n, count - n) * factor, count - n);
}

template <class X>
SWATHE_TARGET static void narrow_row(const float* from, X* to, int64_t count) {
  int64_t n = 0;
  for (; n + lanes <= count; n += lanes) store(to + n, load(from + n));
  if (n < count) store_part(to + n, load_part(from + n, count - n), count - n);
}

// The rows of a block times `factor`, features down and rows across; 0 past the last row.
template <class X>
SWATHE_TARGET static void pack(const void* x, const Strides& by, const Block& at, int64_t D,
                               float factor, float* line, float* to) {
  const int64_t width = vectors_of(at) * lanes;
  std::memset(to, 0, D * width * sizeof(float));
  for (int64_t r = 0; r < at.rows; ++r) {
    widen_row(row_at<X>(x, by, at.b, at.head_of(r), at.token(r)), factor, line, D);
    for (int64_t d = 0; d < D; ++d) to[d * width + r] = line[d];
  }
}

// The rows of a block as they are, `width` floats apart, which are 0 past the last feature.
template <class X>
SWATHE_TARGET static void rows_of(const void* x, const Strides& by, const Block& at, int64_t D,
                                  int64_t width, float* to) {
  for (int64_t r = 0; r < at.rows; ++r) {
    const X* row = row_at<X>(x, by, at.b, at.head_of(r), at.token(r));
    widen_row(row, 1.0f, to + r * width, D);
    for (int64_t d = D; d < width; ++d) to[r * width + d] = 0.0f;
  }
}

// Rows s .. s + n of keys or values as floats: in place where they are, else widened into `room`.
struct Keys {
  const float* at;
  int64_t stride;
};

template <class X>
SWATHE_TARGET static Keys keys_at(const Attention& a, const void* x, const Strides& by, int64_t b,
                                  int64_t kv, int64_t s, int64_t n, int64_t D,
                                  float* room) {
  const int64_t width = padded(D);
  if (std::is_same<X, float>::value && a.table == nullptr) {
    const void* row = row_at<X>(x, by, b, kv, s);
    return {static_cast<const float*>(row), by.t};
  }
  for (int64_t i = 0; i < n; ++i) {
    int64_t page = b, t = s + i;
    if (a.table != nullptr) {
      page = a.table[b * a.table_b + t / a.page];
      t %= a.page;
    }
    widen_row(row_at<X>(x, by, page, kv, t), 1.0f, room + i * width, D);
    for (int64_t d = D; d < width; ++d) room[i * width + d] = 0.0f;
  }
  return {room, width};
}

// What rows see and where they sit; returns the keys [begin, end) that any of them may see.
struct Span {
  int64_t begin, end;    // of keys that some row sees
  int64_t inner, outer;  // of keys that no row's interval hides
};

SWATHE_TARGET static Span rows_see(const Attention& a, const Block& at, Room& room) {
  Span span = {a.S, 0, 0, a.S};
  for (int64_t r = 0; r < kRows; ++r) {
    room.first[r] = room.last[r] = 0;
    room.slope[r] = room.place[r] = 0.0f;
  }
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t t = at.token(r), h = at.head_of(r);
    const int64_t bound = at.b * a.bounds_b + t * a.bounds_t;
    const int64_t first = std::max<int64_t>(a.first[bound], 0);
    const int64_t last = std::min<int64_t>(a.last[bound], a.S);
    room.first[r] = static_cast<int32_t>(first);
    room.last[r] = static_cast<int32_t>(last);
    span.inner = std::max(span.inner, first);
    span.outer = std::min(span.outer, last);
    if (first < last) {
      span.begin = std::min(span.begin, first);
      span.end = std::max(span.end, last);
    }
    if (a.alibi != nullptr) {
      room.slope[r] = a.alibi[at.b * a.alibi_b + h] * static_cast<float>(kLog2e);
      room.place[r] = static_cast<float>(
          a.places != nullptr ? a.places[at.b * a.places_b + t] : t + a.S - a.T);
    }
  }
  return span;
}

// The number that a bias adds to one score.
SWATHE_INLINE float bias_at(const Attention& a, int64_t b, int64_t h, int64_t t, int64_t s) {
  const int64_t* by = a.bias_at;
  const int64_t at = b * by[0] + h * by[1] + t * by[2] + s * by[3];
  if (a.bias_type == kFloat32) return static_cast<const float*>(a.bias)[at];
  if (a.bias_type == kBFloat16) return load_part(static_cast<const bf16*>(a.bias) + at, 1)[0];
  return load_part(static_cast<const f16*>(a.bias) + at, 1)[0];
}

// Whether the boolean masks show a key to a row.
SWATHE_INLINE bool shown(const Attention& a, int64_t b, int64_t h, int64_t t, int64_t s) {
  const int64_t* by = a.allowed_at;
  if (a.allowed != nullptr && !a.allowed[b * by[0] + h * by[1] + t * by[2] + s * by[3]]) {
    return false;
  }
  return a.keys == nullptr || a.keys[b * a.keys_b + s];
}

// Adds the bias to a tile of scores, and hides what dense masks hide.
SWATHE_TARGET static void apply_dense(const Attention& a, const Block& at, int64_t s, int64_t n,
                                      float* z) {
  const int64_t width = vectors_of(at) * lanes;
  const float lowest = static_cast<float>(a.lowest);
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t t = at.token(r), h = at.head_of(r);
    for (int64_t i = 0; i < n; ++i) {
      float& score = z[i * width + r];
      if (a.bias != nullptr) {
        const float bias = bias_at(a, at.b, h, t, s + i);
        score = bias > lowest ? score + bias * static_cast<float>(kLog2e) : -INFINITY;
      }
      if (!shown(a, at.b, h, t, s + i)) score = -INFINITY;
    }
  }
}

// Scores of keys s .. s + n, which are q k^T so far: capped, biased, hidden. With a softcap,
// `slope` gets what their gradient is multiplied by.
SWATHE_TARGET static void finish_scores(const Attention& a, const Block& at, const Span& span,
                                        int64_t s, int64_t n, const Room& room, float* z,
                                        float* slope) {
  const int64_t vectors = vectors_of(at), width = vectors * lanes;
  if (a.softcap != 0.0) {
    const float cap = static_cast<float>(a.softcap * kLog2e);
    for (int64_t i = 0; i < n * width; i += lanes) {
      const vf t = tanh_of(load(z + i));
      store(z + i, t * cap);
      if (slope != nullptr) store(slope + i, 1.0f - t * t);
    }
  }
  if (a.alibi != nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t v = 0; v < width; v += lanes) {
        const vf distance = static_cast<float>(s + i) - load(room.place + v);
        store(z + i * width + v, load(z + i * width + v) + load(room.slope + v) * distance);
      }
    }
  }
  if (a.bias != nullptr || a.allowed != nullptr || a.keys != nullptr) {
    apply_dense(a, at, s, n, z);
  }
  if (s >= span.inner && s + n <= span.outer) return;
  const vf hidden = all(-INFINITY);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = static_cast<int32_t>(s + i);
    for (int64_t v = 0; v < width; v += lanes) {
      vi first, last;
      std::memcpy(&first, room.first + v, sizeof first);
      std::memcpy(&last, room.last + v, sizeof last);
      const vf score = load(z + i * width + v);
      store(z + i * width + v, ((first <= key) & (last > key)) ? score : hidden);
    }
  }
}

// What q is multiplied by before the product: scores then come in units of log 2, or of the cap.
SWATHE_INLINE float factor_of(const Attention& a) {
  return static_cast<float>(a.softcap != 0.0 ? a.scale / a.softcap : a.scale * kLog2e);
}

// Turns a tile of scores into weights against the rows' new maxima, updates maxima and sums, and
// leaves in `alpha` what earlier weights are to be multiplied by; false where that is 1 throughout.
SWATHE_TARGET static bool weigh(float* z, int64_t n, int64_t vectors, const Room& room) {
  const int64_t width = vectors * lanes;
  bool rescale = false;
  for (int64_t v = 0; v < width; v += lanes) {
    const vf before = load(room.max + v);
    vf most = before;
    for (int64_t i = 0; i < n; ++i) {
      const vf score = load(z + i * width + v);
      most = most > score ? most : score;
    }
    const vf base = most == -INFINITY ? vf{} : most;
    vf sums[4] = {};
    for (int64_t i = 0; i < n; ++i) {
      const vf weight = exp2_of(load(z + i * width + v) - base);
      store(z + i * width + v, weight);
      sums[i % 4] += weight;
    }
    const vf alpha = exp2_of(before - base);
    const vf total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    store(room.sum + v, load(room.sum + v) * alpha + total);
    store(room.max + v, most);
    store(room.alpha + v, alpha);
    for (int lane = 0; lane < lanes; ++lane) rescale |= before[lane] != most[lane];
  }
  return rescale;
}
