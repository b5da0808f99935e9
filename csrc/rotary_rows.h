// Rotary embedding over a range of tokens; the body of rotary.cpp for each instruction set.
//
//   y1, y2 = x1 * c1 - x2 * s1,  x2 * c2 + x1 * s2        for each pair (x1, x2) of a head
//
// A token's angles are gathered once, in fp32 and in the order of the features they meet, and serve
// all its heads. Arithmetic is fp32; kRound rounds each product to x's type first, as HF's eager
// code does. Nothing depends on anything but a pair and its angle.
#include "row_loops.h"

// Where one axis of a token's angles stands in the tables.
SWATHE_INLINE int64_t row_of(const Rotation& a, int64_t axis, int64_t b, int64_t s) {
  const int64_t at = axis * a.axis_stride + b * a.batch_stride + s * a.token_stride;
  return a.positions == nullptr ? at : position_at(a, at) * a.row_stride;
}

// The token's row of one table, widened; with mrope each section of pairs comes from its own axis.
template <class T>
SWATHE_TARGET static void gather(const Rotation& a, const T* table, int64_t b, int64_t s,
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
SWATHE_TARGET static void angles(const Rotation& a, int64_t b, int64_t s, float* c, float* sines) {
  switch (a.table_type) {
    case kFloat32:
      gather(a, static_cast<const float*>(a.cos), b, s, c);
      gather(a, static_cast<const float*>(a.sin), b, s, sines);
      break;
    case kBFloat16:
      gather(a, static_cast<const bf16*>(a.cos), b, s, c);
      gather(a, static_cast<const bf16*>(a.sin), b, s, sines);
      break;
    default:
      gather(a, static_cast<const f16*>(a.cos), b, s, c);
      gather(a, static_cast<const f16*>(a.sin), b, s, sines);
  }
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
    first = a.back ? s2 : -s1;
    second = a.back ? -s1 : s2;
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

template <class X, bool kRound>
SWATHE_INLINE void turn_pairs(const X* x, X* y, const float* c, const float* s, int64_t R) {
  int64_t n = 0;
  for (; n + lanes <= R; n += lanes) {
    const vf v = load(x + n);
    store(y + n, turned<X, kRound>(v, exchanged(v), load(c + n), load(s + n)));
  }
  if (n < R) {
    const int64_t count = R - n;
    const vf v = load_part(x + n, count);
    const vf cosines = load_part(c + n, count), sines = load_part(s + n, count);
    store_part(y + n, turned<X, kRound>(v, exchanged(v), cosines, sines), count);
  }
}

template <class X, bool kRound>
SWATHE_INLINE void turn_halves(const X* x, X* y, const float* c, const float* s, int64_t R) {
  const int64_t half = R / 2;
  int64_t n = 0;
  for (; n + lanes <= half; n += lanes) {
    const vf x1 = load(x + n), x2 = load(x + half + n);
    store(y + n, turned<X, kRound>(x1, x2, load(c + n), load(s + n)));
    store(y + half + n, turned<X, kRound>(x2, x1, load(c + half + n), load(s + half + n)));
  }
  if (n < half) {
    const int64_t count = half - n, second = half + n;
    const vf x1 = load_part(x + n, count), x2 = load_part(x + second, count);
    const vf c1 = load_part(c + n, count), s1 = load_part(s + n, count);
    const vf c2 = load_part(c + second, count), s2 = load_part(s + second, count);
    store_part(y + n, turned<X, kRound>(x1, x2, c1, s1), count);
    store_part(y + second, turned<X, kRound>(x2, x1, c2, s2), count);
  }
}

template <class X, bool kRound, bool kInterleaved>
SWATHE_TARGET static void rotate_heads(const Rotation& a, const Heads& of, int64_t b, int64_t s,
                                       const float* c, const float* sines) {
  const X* x = static_cast<const X*>(of.x) + b * of.x_b + s * of.x_s;
  X* y = static_cast<X*>(of.y) + b * of.y_b + s * of.y_s;
  for (int64_t head = 0; head < of.count; ++head, x += of.x_h, y += of.y_h) {
    if (kInterleaved) {
      turn_pairs<X, kRound>(x, y, c, sines, a.R);
    } else {
      turn_halves<X, kRound>(x, y, c, sines, a.R);
    }
    if (a.R < a.D) std::memcpy(y + a.R, x + a.R, (a.D - a.R) * sizeof(X));
  }
}

template <class X, bool kRound, bool kInterleaved>
SWATHE_TARGET static void rotate_tokens(const Rotation& a, int64_t begin, int64_t end,
                                        float* room) {
  float *c = room, *sines = room + a.R;
  for (int64_t m = begin; m < end; ++m) {
    const int64_t b = m / a.S, s = m % a.S;
    // with one set of angles for all sequences they are still gathered anew: R of D * heads
    angles(a, b, s, c, sines);
    rotate_heads<X, kRound, kInterleaved>(a, a.q, b, s, c, sines);
    rotate_heads<X, kRound, kInterleaved>(a, a.k, b, s, c, sines);
  }
}

template <class X, bool kRound>
static void rotate_as(const Rotation& a, int64_t begin, int64_t end, float* room) {
  return a.interleaved ? rotate_tokens<X, kRound, true>(a, begin, end, room)
                       : rotate_tokens<X, kRound, false>(a, begin, end, room);
}

static void rotate(const Rotation& a, int64_t begin, int64_t end, float* room) {
  switch (a.x_type) {
    case kFloat32:
      return rotate_as<float, false>(a, begin, end, room);
    case kBFloat16:
      return a.round ? rotate_as<bf16, true>(a, begin, end, room)
                     : rotate_as<bf16, false>(a, begin, end, room);
    default:
      return a.round ? rotate_as<f16, true>(a, begin, end, room)
                     : rotate_as<f16, false>(a, begin, end, room);
  }
}
