// Gated activations over a part of a row; the body of gated_mlp_act.cpp for each instruction set.
//
//   y = act(gate) * up        dgate = dy * up * act'(gate)        dup = dy * act(gate)
//
//   silu       x * s(x)               s(z) = 1 / (1 + exp(-z)), c = 1 - s
//   gelu_tanh  x * s(z)               z = 2 sqrt(2 / pi) * (x + 0.044715 x^3), since s(2v) is
//                                     (1 + tanh(v)) / 2
//   gelu       x * Phi(x)             Phi the normal distribution function
//   relu       max(x, 0)              relu2 its square
//   gpt_oss    (u + 1) * g * s(alpha * g),  g = min(gate, limit),  u = clamp(up, -limit, limit)
//
// All arithmetic is fp32; kLlama rounds y where HF's code does. Elements do not depend on each
// other.
#include "row_loops.h"
#include "vec_math.h"

constexpr float kBeta = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float kKappa = 0.044715f;
constexpr float kFlatFrom = 16.0f;  // beyond, s(z) of gelu_tanh is 0 or 1 in fp32

SWATHE_INLINE vf clamped(vf x, float low, float high) { return at_least(at_most(x, high), low); }

// act(x) and its derivative; gpt_oss without its clamps and without up + 1.
template <int kAct>
SWATHE_INLINE void act_of(vf x, float alpha, vf& a, vf& slope) {
  vf s, c;
  switch (kAct) {
    case kSilu:
      logistic(x, s, c);
      a = x * s;
      slope = s + x * (s * c);
      return;
    case kGptOss:
      logistic(alpha * x, s, c);
      a = x * s;
      slope = s + alpha * (x * (s * c));
      return;
    case kGeluTanh: {
      // x^2 may overflow, but where it could the derivative of s is 0
      const vf near = clamped(x, -kFlatFrom, kFlatFrom), square = near * near;
      logistic(2.0f * kBeta * near * (1.0f + kKappa * square), s, c);
      a = x * s;
      slope = s + x * (s * c) * (2.0f * kBeta + 6.0f * kBeta * kKappa * square);
      return;
    }
    case kGelu:
      normal(x, s, c);
      a = x * s;
      slope = s + x * c;
      return;
    default: {
      const vf positive = x <= 0 ? vf{} : x;
      a = kAct == kRelu ? positive : positive * positive;
      slope = kAct == kRelu ? (x <= 0 ? vf{} : all(1.0f)) : 2.0f * positive;
    }
  }
}

// y of gates and ups as they were loaded from T.
template <class T, int kAct, bool kLlama>
SWATHE_INLINE vf gated(vf gate, vf up, float limit, float alpha) {
  vf a, slope;
  if (kAct == kGptOss) {
    gate = at_most(gate, limit);
    up = clamped(up, -limit, limit) + 1.0f;
  }
  if (kLlama && kAct == kGptOss) {
    vf s, c;
    logistic(rounded(alpha * gate, T{}), s, c);
    a = gate * rounded(s, T{});
    up = rounded(up, T{});
  } else if (kLlama && kAct == kGeluTanh) {
    // torch's own form: its 1 + tanh cancels far left, which 16 bits show
    const vf inner = kBeta * (gate + kKappa * gate * gate * gate);
    a = 0.5f * gate * (1.0f + tanh_of(inner));
  } else if (kLlama && kAct == kGelu) {
    // likewise 1 + erf
    vf area, density;
    normal(-magnitude(gate), area, density);
    const vf erf = 1.0f - 2.0f * area;
    a = 0.5f * gate * (1.0f + (gate < 0 ? -erf : erf));
  } else {
    act_of<kAct>(gate, alpha, a, slope);
  }
  if (kLlama) a = rounded(a, T{});
  return a * up;
}

template <int kAct>
SWATHE_INLINE void gradients(vf dy, vf gate, vf up, float limit, float alpha, vf& dgate, vf& dup) {
  vf a, slope;
  if (kAct == kGptOss) {
    const vf u = clamped(up, -limit, limit);
    act_of<kAct>(at_most(gate, limit), alpha, a, slope);
    // NaN is outside the clamp, as in torch
    dgate = gate <= limit ? dy * (u + 1.0f) * slope : vf{};
    const vf within = up <= limit ? dy * a : vf{};
    dup = up >= -limit ? within : vf{};
    return;
  }
  act_of<kAct>(gate, alpha, a, slope);
  dgate = dy * up * slope;
  // also where up or dy is infinite
  if (kAct == kRelu || kAct == kRelu2) dgate = gate <= 0 ? vf{} : dgate;
  dup = dy * a;
}

template <class T, int kAct, bool kLlama, bool kStream>
struct Forward {
  const T *gate, *up;
  T* y;
  float limit, alpha;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w) const {
    const vf out = gated<T, kAct, kLlama>(load(gate + n, w), load(up + n, w), limit, alpha);
    store_as<kStream>(y + n, out, w);
  }
};

template <class T, int kAct, bool kStream>
struct Backward {
  const T *dy, *gate, *up;
  T *dgate, *dup;
  float limit, alpha;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w) const {
    vf dg, du;
    const vf g = load(gate + n, w), u = load(up + n, w);
    gradients<kAct>(load(dy + n, w), g, u, limit, alpha, dg, du);
    store_as<kStream>(dgate + n, dg, w);
    store_as<kStream>(dup + n, du, w);
  }
};

// gpt_oss clamps at what T holds.
template <class T>
SWATHE_TARGET static float limit_of(const Gated& a) {
  return rounded(all(static_cast<float>(a.limit)), T{})[0];
}

template <class T, int kAct, bool kLlama>
SWATHE_TARGET static void forward_part(const Gated& a, const T* gate, const T* up, T* y,
                                       bool stream, int64_t count) {
  const float limit = limit_of<T>(a), alpha = static_cast<float>(a.alpha);
  if (stream && streamable(y)) {
    each_column(count, Forward<T, kAct, kLlama, true>{gate, up, y, limit, alpha});
    return streamed();
  }
  each_column(count, Forward<T, kAct, kLlama, false>{gate, up, y, limit, alpha});
}

template <class T, int kAct>
SWATHE_TARGET static void backward_part(const Gated& a, const T* dy, const T* gate, const T* up,
                                        T* dgate, T* dup, bool stream, int64_t count) {
  const float limit = limit_of<T>(a), alpha = static_cast<float>(a.alpha);
  if (stream && streamable(dgate) && streamable(dup)) {
    each_column(count, Backward<T, kAct, true>{dy, gate, up, dgate, dup, limit, alpha});
    return streamed();
  }
  each_column(count, Backward<T, kAct, false>{dy, gate, up, dgate, dup, limit, alpha});
}

// Interleaved pairs taken apart and joined, a piece at a time: copies that stay in the first cache.
constexpr int64_t kPiece = 512;

template <class T>
SWATHE_TARGET static void take_apart(const T* pairs, T* first, T* second, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    first[i] = pairs[2 * i];
    second[i] = pairs[2 * i + 1];
  }
}

template <class T>
SWATHE_TARGET static void join(const T* first, const T* second, T* pairs, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    pairs[2 * i] = first[i];
    pairs[2 * i + 1] = second[i];
  }
}

template <class F>
static void with_act(int64_t act, const F& f) {
  switch (act) {
    case kSilu:
      return f(std::integral_constant<int, kSilu>{});
    case kGeluTanh:
      return f(std::integral_constant<int, kGeluTanh>{});
    case kGelu:
      return f(std::integral_constant<int, kGelu>{});
    case kRelu:
      return f(std::integral_constant<int, kRelu>{});
    case kRelu2:
      return f(std::integral_constant<int, kRelu2>{});
    default:
      return f(std::integral_constant<int, kGptOss>{});
  }
}

template <class T>
static T* at(void* base, int64_t stride, int64_t m, int64_t n) {
  return static_cast<T*>(base) + m * stride + n;
}

template <class T>
static const T* at(const void* base, int64_t stride, int64_t m, int64_t n) {
  return static_cast<const T*>(base) + m * stride + n;
}

template <class T, int kAct>
static void forward_as(const Gated& a, bool stream, int64_t m, int64_t n, int64_t count) {
  // without roundings in between, these differ in nothing but the form of gelu
  constexpr bool gelu = kAct == kGelu || kAct == kGeluTanh;
  const auto part = a.llama ? forward_part<T, kAct, gelu || !std::is_same_v<T, float>>
                            : forward_part<T, kAct, false>;
  T* y = at<T>(a.first, a.out_stride, m, n);
  if (!a.pairs) {
    const T *gate = at<T>(a.gate, a.gate_stride, m, n), *up = at<T>(a.up, a.up_stride, m, n);
    return part(a, gate, up, y, stream, count);
  }
  T gate[kPiece], up[kPiece];
  const T* x = at<T>(a.gate, a.gate_stride, m, 2 * n);
  for (int64_t start = 0; start < count; start += kPiece) {
    const int64_t some = std::min(kPiece, count - start);
    take_apart(x + 2 * start, gate, up, some);
    part(a, gate, up, y + start, stream, some);
  }
}

template <class T, int kAct>
static void backward_as(const Gated& a, bool stream, int64_t m, int64_t n, int64_t count) {
  const auto part = backward_part<T, kAct>;
  const T* dy = at<T>(a.dy, a.dy_stride, m, n);
  if (!a.pairs) {
    const T *gate = at<T>(a.gate, a.gate_stride, m, n), *up = at<T>(a.up, a.up_stride, m, n);
    T *dgate = at<T>(a.first, a.out_stride, m, n), *dup = at<T>(a.second, a.out_stride, m, n);
    return part(a, dy, gate, up, dgate, dup, stream, count);
  }
  T gate[kPiece], up[kPiece], dgate[kPiece], dup[kPiece];
  const T* x = at<T>(a.gate, a.gate_stride, m, 2 * n);
  T* dx = at<T>(a.first, a.out_stride, m, 2 * n);
  for (int64_t start = 0; start < count; start += kPiece) {
    const int64_t some = std::min(kPiece, count - start);
    take_apart(x + 2 * start, gate, up, some);
    part(a, dy + start, gate, up, dgate, dup, false, some);
    join(dgate, dup, dx + 2 * start, some);
  }
}

static void forward(const Gated& a, bool stream, int64_t m, int64_t n, int64_t count) {
  with_type(a.type, [&](auto t) {
    with_act(a.act, [&](auto act) {
      forward_as<decltype(t), decltype(act)::value>(a, stream, m, n, count);
    });
  });
}

static void backward(const Gated& a, bool stream, int64_t m, int64_t n, int64_t count) {
  with_type(a.type, [&](auto t) {
    with_act(a.act, [&](auto act) {
      backward_as<decltype(t), decltype(act)::value>(a, stream, m, n, count);
    });
  });
}
