// Programs: calls into this library that were packed before, run one after another in one call.
#include <cstring>

#include "abi.h"

namespace swathe {
namespace {

// What stands before the arguments of each step.
struct Step {
  int32_t (*run)(const void*);
  int64_t bytes;
};

// Rows of a cache, as kernels/core/program.py packs them: y[b, h, position + t] = x[b, h, t].
struct Append {
  const char* x;
  char* y;
  const int64_t* position;
  int64_t B, H, T, row;                    // row: bytes of one, which are adjacent
  int64_t x_b, x_h, x_t, y_b, y_h, y_t;  // bytes
};

}  // namespace
}  // namespace swathe

using namespace swathe;

// Where to write is read when the step runs: a program can serve one position after another.
SWATHE_API int32_t swathe_append(const void* packed) {
  Append a;
  std::memcpy(&a, packed, sizeof a);
  for (int64_t b = 0; b < a.B; ++b) {
    for (int64_t h = 0; h < a.H; ++h) {
      for (int64_t t = 0; t < a.T; ++t) {
        std::memcpy(a.y + b * a.y_b + h * a.y_h + (*a.position + t) * a.y_t,
                    a.x + b * a.x_b + h * a.x_h + t * a.x_t, a.row);
      }
    }
  }
  return 0;
}

// The number of steps, then each with its arguments. Returns 0, or what the first failed step did.
SWATHE_API int32_t swathe_run(const void* packed) {
  const char* at = static_cast<const char*>(packed);
  int64_t count;
  std::memcpy(&count, at, sizeof count);
  at += sizeof count;
  for (int64_t i = 0; i < count; ++i) {
    Step step;
    std::memcpy(&step, at, sizeof step);
    at += sizeof step;
    const int32_t failed = step.run(at);
    if (failed) return failed;
    at += step.bytes;
  }
  return 0;
}
