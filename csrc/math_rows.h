// One function of vec_math.h over an array; the body of math.cpp for each instruction set.
#include "row_loops.h"
#include "vec_math.h"

struct Apply {
  const float* x;
  float* y;
  int64_t function;

  template <class W>
  SWATHE_METHOD void operator()(int64_t n, W w) const {
    const vf v = load(x + n, w);
    vf out, other;
    switch (function) {
      case kExp:
        out = exp_of(v);
        break;
      case kLogistic:
        logistic(v, out, other);
        break;
      case kTanh:
        out = tanh_of(v);
        break;
      case kNormal:
        normal(v, out, other);
        break;
      default:
        normal(v, other, out);
    }
    store(y + n, out, w);
  }
};

SWATHE_TARGET static void apply(const float* x, float* y, int64_t function, int64_t count) {
  each_column(count, Apply{x, y, function});
}
