// Rotary embedding over a range of tokens; the body of rotary.cpp for each instruction set.
//
// Arithmetic is fp32. Nothing depends on anything but a pair and its angle.
#include "row_loops.h"

#include "angle_rows.h"

template <class X, bool kRound, bool kInterleaved>
SWATHE_TARGET static void rotate_heads(const Rotation& a, const Heads& of, int64_t b, int64_t s,
                                       const float* c, const float* sines) {
  const X* x = static_cast<const X*>(of.x) + b * of.x_b + s * of.x_s;
  X* y = static_cast<X*>(of.y) + b * of.y_b + s * of.y_s;
  const int64_t R = a.turning.R;
  for (int64_t head = 0; head < of.count; ++head, x += of.x_h, y += of.y_h) {
    turn<X, kRound, kInterleaved>(x, y, c, sines, R);
    if (R < a.D) std::memcpy(y + R, x + R, (a.D - R) * sizeof(X));
  }
}

template <class X, bool kRound, bool kInterleaved>
SWATHE_TARGET static void rotate_tokens(const Rotation& a, int64_t begin, int64_t end,
                                        float* room) {
  float *c = room, *sines = room + a.turning.R;
  for (int64_t m = begin; m < end; ++m) {
    const int64_t b = m / a.S, s = m % a.S;
    // with one set of angles for all sequences they are still gathered anew: R of D * heads
    angles(a.turning, a.back, b, s, c, sines);
    rotate_heads<X, kRound, kInterleaved>(a, a.q, b, s, c, sines);
    rotate_heads<X, kRound, kInterleaved>(a, a.k, b, s, c, sines);
  }
}

static void rotate(const Rotation& a, int64_t begin, int64_t end, float* room) {
  with_type(a.x_type, [&](auto x) {
    with_bool(a.turning.interleaved, [&](auto interleaved) {
      using X = decltype(x);
      constexpr bool kRound = !std::is_same_v<X, float>;
      constexpr bool kInterleaved = decltype(interleaved)::value;
      if (a.round) return rotate_tokens<X, kRound, kInterleaved>(a, begin, end, room);
      rotate_tokens<X, false, kInterleaved>(a, begin, end, room);
    });
  });
}
