// RMSNorm of heads, then rotary, over a range of tokens; the body of qk_norm_rotary.cpp for each
// instruction set.
//
//   xhat = x * rstd,  rstd = 1 / sqrt(mean(x^2) + eps)        h = xhat * scale        y = turned h
//   g = dy turned back        dx = rstd * (g * scale - xhat * mean(g * scale * xhat))
//   dw = sum of g * xhat over all heads of all tokens
//
// scale = offset + weight is fp32, prepared once. Arithmetic is fp32. y and dx of a head depend on
// nothing but the head and its angles.
#include "row_loops.h"

#include "angle_rows.h"
#include "row_weights.h"

template <class X>
struct HeadSquares {
  const X* x;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w, vf* sums) const {
    const vf v = load(x + n, w);
    sums[0] += v * v;
  }
};

// h; kTwice rounds xhat to X, kRound h, as HF's norms do.
template <class X, bool kTwice, bool kRound>
struct Normalise {
  const X* x;
  const float* scale;
  float rstd;
  float* h;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w) const {
    vf v = load(x + n, w) * rstd;
    if (kTwice) v = rounded(v, X{});
    v = v * load(scale + n, w);
    if (kRound) v = rounded(v, X{});
    store(h + n, v, w);
  }
};

template <class X>
struct Narrow {
  const float* from;
  X* to;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w) const {
    store(to + n, load(from + n, w), w);
  }
};

SWATHE_INLINE float rstd_of(double squares, int64_t D, float eps) {
  return 1.0f / std::sqrt(static_cast<float>(squares / static_cast<double>(D)) + eps);
}

template <class X, Rounding kRounding, bool kInterleaved>
SWATHE_TARGET static void forward_heads(const Normed& a, const NormedHeads& of, int64_t b,
                                        int64_t s, const Room& room) {
  constexpr bool kTwice = kRounding >= kXhat, kRound = kRounding != kOnce;
  constexpr bool kProducts = kRounding == kProductsToo || kRounding == kXhatAndProducts;
  const Heads& heads = of.heads;
  const X* x = static_cast<const X*>(heads.x) + b * heads.x_b + s * heads.x_s;
  X* y = static_cast<X*>(heads.y) + b * heads.y_b + s * heads.y_s;
  const float eps = static_cast<float>(a.eps);
  const int64_t R = a.turning.R;
  for (int64_t head = 0; head < heads.count; ++head, x += heads.x_h, y += heads.y_h) {
    double squares[1];
    row_sums(a.D, HeadSquares<X>{x}, squares);
    const float rstd = rstd_of(squares[0], a.D, eps);
    each_column(a.D, Normalise<X, kTwice, kRound>{x, of.scale, rstd, room.head});
    turn<X, kProducts, kInterleaved>(room.head, y, room.c, room.s, R);
    each_column(a.D - R, Narrow<X>{room.head + R, y + R});
  }
}

// sum(x^2) and sum(g * scale * x).
template <class X>
struct HeadDots {
  const X* x;
  const float *g, *scale;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w, vf* sums) const {
    const vf v = load(x + n, w);
    sums[0] += v * v;
    sums[1] += load(g + n, w) * load(scale + n, w) * v;
  }
};

template <class X>
struct HeadGradient {
  const X* x;
  const float *g, *scale;
  float rstd, mean;
  X* dx;
  float* dw;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w) const {
    const vf turned = load(g + n, w), xhat = load(x + n, w) * rstd;
    store(dx + n, (turned * load(scale + n, w) - xhat * mean) * rstd, w);
    store(dw + n, load(dw + n, w) + turned * xhat, w);
  }
};

template <class X, bool kInterleaved>
SWATHE_TARGET static void backward_heads(const Normed& a, const NormedHeads& of, int64_t b,
                                         int64_t s, const Room& room, float* dw) {
  const Heads& heads = of.heads;
  const X* x = static_cast<const X*>(heads.x) + b * heads.x_b + s * heads.x_s;
  const X* dy = static_cast<const X*>(of.dy) + b * of.dy_b + s * of.dy_s;
  X* dx = static_cast<X*>(heads.y) + b * heads.y_b + s * heads.y_s;
  const float eps = static_cast<float>(a.eps);
  const int64_t R = a.turning.R;
  for (int64_t head = 0; head < heads.count; ++head) {
    turn<X, false, kInterleaved>(dy, room.head, room.c, room.s, R);
    widen_row(dy + R, room.head + R, a.D - R);
    double dots[2];
    row_sums(a.D, HeadDots<X>{x, room.head, of.scale}, dots);
    const float rstd = rstd_of(dots[0], a.D, eps);
    const float mean = static_cast<float>(dots[1] / static_cast<double>(a.D) * rstd);
    each_column(a.D, HeadGradient<X>{x, room.head, of.scale, rstd, mean, dx, dw});
    x += heads.x_h;
    dy += of.dy_h;
    dx += heads.y_h;
  }
}

template <class X, Rounding kRounding, bool kInterleaved>
SWATHE_TARGET static void forward_tokens(const Normed& a, int64_t begin, int64_t end,
                                         const Room& room) {
  for (int64_t m = begin; m < end; ++m) {
    const int64_t b = m / a.S, s = m % a.S;
    angles(a.turning, false, b, s, room.c, room.s);
    forward_heads<X, kRounding, kInterleaved>(a, a.q, b, s, room);
    forward_heads<X, kRounding, kInterleaved>(a, a.k, b, s, room);
  }
}

template <class X, bool kInterleaved>
SWATHE_TARGET static void backward_tokens(const Normed& a, int64_t begin, int64_t end,
                                          const Room& room, float* dw) {
  for (int64_t m = begin; m < end; ++m) {
    const int64_t b = m / a.S, s = m % a.S;
    angles(a.turning, true, b, s, room.c, room.s);
    backward_heads<X, kInterleaved>(a, a.q, b, s, room, dw);
    backward_heads<X, kInterleaved>(a, a.k, b, s, room, dw + a.D);
  }
}

template <class F>
static void with_rounding(int64_t rounding, const F& f) {
  switch (rounding) {
    case kOnce:
      return f(std::integral_constant<Rounding, kOnce>{});
    case kHead:
      return f(std::integral_constant<Rounding, kHead>{});
    case kProductsToo:
      return f(std::integral_constant<Rounding, kProductsToo>{});
    case kXhat:
      return f(std::integral_constant<Rounding, kXhat>{});
    default:
      return f(std::integral_constant<Rounding, kXhatAndProducts>{});
  }
}

static void forward(const Normed& a, int64_t begin, int64_t end, const Room& room) {
  with_type(a.x_type, [&](auto x) {
    with_bool(a.turning.interleaved, [&](auto interleaved) {
      using X = decltype(x);
      constexpr bool kInterleaved = decltype(interleaved)::value;
      // fp32 is never rounded in between
      if constexpr (std::is_same_v<X, float>) {
        forward_tokens<X, kOnce, kInterleaved>(a, begin, end, room);
      } else {
        with_rounding(a.rounding, [&](auto rounding) {
          forward_tokens<X, decltype(rounding)::value, kInterleaved>(a, begin, end, room);
        });
      }
    });
  });
}

// dw: D sums for the weight of q, then D for that of k.
static void backward(const Normed& a, int64_t begin, int64_t end, const Room& room, float* dw) {
  with_type(a.x_type, [&](auto x) {
    with_bool(a.turning.interleaved, [&](auto interleaved) {
      backward_tokens<decltype(x), decltype(interleaved)::value>(a, begin, end, room, dw);
    });
  });
}

static constexpr QkNormIsa table = {forward, backward, prepare, finish};
