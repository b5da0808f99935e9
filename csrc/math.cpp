// The functions of vec_math.h over arrays, for tests.
#include <cstring>

#include "abi.h"
#include "choose.h"
#include "isa.h"

namespace swathe {
namespace {

enum Function : int64_t { kExp = 0, kLogistic, kTanh, kNormal, kDensity };

}  // namespace
}  // namespace swathe

#define SWATHE_BODY "math_rows.h"
#include "each_isa.h"

using namespace swathe;

// y[i] = function(x[i]), all fp32; every field takes 8 bytes.
struct MathArguments {
  const float* x;
  float* y;
  int64_t function, count;
};

SWATHE_API int32_t swathe_math(const void* packed) {
  MathArguments a;
  std::memcpy(&a, packed, sizeof a);
  SWATHE_HERE(apply)(a.x, a.y, a.function, a.count);
  return 0;
}
