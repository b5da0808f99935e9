// Cross-entropy over a range of rows; the body of cross_entropy.cpp for each instruction set.
//
//   z = scale * x          with a softcap c: z = c * tanh(scale * x / c)
//   loss = lse - (1 - s) * z[label] - s * mean(z) + z_loss * lse^2        lse = peak + log_sum
//   dz = exp(z - lse) * (1 + 2 * z_loss * lse) - s / V - (1 - s) * [v = label]
//   dx = arriving * scale * dz * (1 - (z / c)^2)
//
// lse is kept as peak and log_sum, because their sum loses the digits of log_sum when logits are
// large. A row is read once going forward, a chunk at a time, whose z stay in the first cache for
// the exponentials. A row's results depend on nothing but the row.
#include "row_loops.h"
#include "vec_math.h"

constexpr float kLowest = -3.0e38f;  // finite, so that -inf minus it is -inf and not NaN

template <bool kCap>
SWATHE_INLINE vf score_of(const Loss& a, vf x) {
  const vf z = x * a.scale;
  return kCap ? a.softcap * tanh_of(z / a.softcap) : z;
}

// z of one chunk into a buffer, -inf past its end; their maximum by lane.
template <class X, bool kCap>
struct Scores {
  const Loss& a;
  const X* x;
  float* z;
  vf* peak;

  SWATHE_METHOD void operator()(int64_t n, Whole w) const {
    const vf v = score_of<kCap>(a, load(x + n, w));
    store(z + n, v);
    *peak = v > *peak ? v : *peak;
  }

  SWATHE_METHOD void operator()(int64_t n, Part w) const {
    std::fill_n(z + n, lanes, -HUGE_VALF);
    store(z + n, score_of<kCap>(a, load(x + n, w)), w);
    const vf v = load(z + n);
    *peak = v > *peak ? v : *peak;
  }
};

struct Total {
  const float* z;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w, vf* sums) const {
    sums[0] += load(z + n, w);
  }
};

struct Exponentials {
  const float* z;
  float peak;

  SWATHE_METHOD void operator()(int64_t n, Whole w, vf* sums) const {
    sums[0] += exp_of(load(z + n, w) - peak);
  }

  // the buffer is whole: exp(-inf) is 0
  SWATHE_METHOD void operator()(int64_t n, Part, vf* sums) const { (*this)(n, Whole{}, sums); }
};

SWATHE_INLINE float largest(vf values) {
  float found = values[0];
  for (int lane = 1; lane < lanes; ++lane) found = std::max(found, values[lane]);
  return found;
}

// peak, the sum of exp(z - peak) and, where labels are smoothed, that of z.
struct RowSums {
  float peak;
  double exponentials, scores;
};

template <class X, bool kCap>
SWATHE_TARGET static RowSums sums_of(const Loss& a, const X* x) {
  float z[kChunk];
  vf peaks = all(kLowest);
  RowSums of = {kLowest, 0, 0};
  for (int64_t start = 0; start < a.V; start += kChunk) {
    const int64_t count = std::min(kChunk, a.V - start);
    each_column(count, Scores<X, kCap>{a, x + start, z, &peaks});
    const float peak = largest(peaks);
    if (peak > of.peak) {
      of.exponentials *= std::exp(static_cast<double>(of.peak) - peak);
      of.peak = peak;
    }
    double sum[1];
    row_sums(count, Exponentials{z, of.peak}, sum);
    of.exponentials += sum[0];
    if (a.smoothing != 0) {
      row_sums(count, Total{z}, sum);
      of.scores += sum[0];
    }
  }
  return of;
}

template <class X, bool kCap>
SWATHE_TARGET static void loss_rows(const Loss& a, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const int64_t label = label_at(a, m);
    if (label == a.ignore_index) {
      a.losses[m] = a.peak[m] = a.log_sum[m] = 0;
      continue;
    }
    const X* x = static_cast<const X*>(a.x) + m * a.x_stride;
    const RowSums of = sums_of<X, kCap>(a, x);
    const double log_sum = std::log(of.exponentials), lse = of.peak + log_sum, s = a.smoothing;
    double loss = NAN;
    if (label >= 0 && label < a.V) {
      const double target = score_of<kCap>(a, load_part(x + label, 1))[0];
      loss = (1 - s) * (log_sum - (target - of.peak)) + a.z_loss * lse * lse;
      if (s != 0) loss += s * (log_sum - (of.scores / static_cast<double>(a.V) - of.peak));
    }
    a.losses[m] = static_cast<float>(loss);
    a.peak[m] = of.peak;
    a.log_sum[m] = static_cast<float>(log_sum);
  }
}

template <class X, bool kCap, bool kStream>
struct LogitGradient {
  const Loss& a;
  const X* x;
  X* dx;
  float peak, log_sum, growth, floor, arriving;  // growth: 1 + 2 * z_loss * lse

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w) const {
    const vf z = load(x + n, w) * a.scale;
    const vf t = kCap ? tanh_of(z / a.softcap) : z, capped = kCap ? a.softcap * t : z;
    vf dz = exp_of((capped - peak) - log_sum) * growth - floor;
    if (kCap) dz *= 1.0f - t * t;
    store_as<kStream>(dx + n, dz * arriving, w);
  }
};

template <class X, bool kCap>
SWATHE_TARGET static void gradient_rows(const Loss& a, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const int64_t label = label_at(a, m);
    X* dx = static_cast<X*>(a.dx) + m * a.V;
    if (label == a.ignore_index) {
      std::memset(dx, 0, a.V * sizeof(X));
      continue;
    }
    const X* x = static_cast<const X*>(a.x) + m * a.x_stride;
    const bool known = label >= 0 && label < a.V;
    const float peak = a.peak[m], log_sum = a.log_sum[m];
    const float growth = 1 + 2 * a.z_loss * (peak + log_sum);
    const float floor = a.smoothing / static_cast<float>(a.V);
    const float arriving = known ? a.arriving[m * a.arriving_stride] * a.scale : NAN;
    const LogitGradient<X, kCap, false> step{a,      x,     dx,      peak, log_sum,
                                             growth, floor, arriving};
    if (a.stream && streamable(dx)) {
      each_column(a.V, LogitGradient<X, kCap, true>{a, x, dx, peak, log_sum, growth, floor,
                                                    arriving});
    } else {
      each_column(a.V, step);
    }
    if (known) {
      LogitGradient<X, kCap, false> at_label = step;
      at_label.floor += 1 - a.smoothing;
      at_label(label, Part{1});
    }
  }
  if (a.stream) streamed();
}

static void forward(const Loss& a, int64_t begin, int64_t end) {
  with_type(a.x_type, [&](auto x) {
    with_bool(a.softcap != 0, [&](auto cap) {
      loss_rows<decltype(x), decltype(cap)::value>(a, begin, end);
    });
  });
}

static void backward(const Loss& a, int64_t begin, int64_t end) {
  with_type(a.x_type, [&](auto x) {
    with_bool(a.softcap != 0, [&](auto cap) {
      gradient_rows<decltype(x), decltype(cap)::value>(a, begin, end);
    });
  });
}
