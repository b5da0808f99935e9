// Rotary embedding: arguments, threads and the C entry point. The arithmetic is in rotary_rows.h.
#include <cstring>
#include <memory>
#include <new>

#include "abi.h"
#include "choose.h"
#include "isa.h"
#include "parallel.h"

namespace swathe {
namespace {

// How the members of a pair find their entries in a table; kernels/core/rotation.py: FORM.
enum Form : int64_t { kHalves = 0, kCompact = 1, kPairs = 2 };

// The heads of q or of k, read at x and written at y; strides in elements.
struct Heads {
  const void* x;
  void* y;
  int64_t count, x_b, x_h, x_s, y_b, y_h, y_s;
};

// Arguments as kernels/rotary/_cpp.py packs them; every field takes 8 bytes.
struct Rotation {
  Heads q, k;
  const void *cos, *sin, *positions;
  int64_t wide_positions;  // 1: int64, 0: int32
  int64_t axis_stride, batch_stride, token_stride, row_stride, rows, h_start, w_start;
  int64_t form, mrope, x_type, table_type, B, S, D, R, interleaved, round, back, threads;
};

inline int64_t position_at(const Rotation& a, int64_t at) {
  return a.wide_positions ? static_cast<const int64_t*>(a.positions)[at]
                          : static_cast<const int32_t*>(a.positions)[at];
}

}  // namespace
}  // namespace swathe

#define SWATHE_BODY "rotary_rows.h"
#include "each_isa.h"

namespace swathe {
namespace {

bool within_tables(const Rotation& a) {
  if (a.positions == nullptr) return true;
  const int64_t batches = a.batch_stride ? a.B : 1;
  for (int64_t axis = 0; axis < (a.mrope ? 3 : 1); ++axis) {
    for (int64_t b = 0; b < batches; ++b) {
      for (int64_t s = 0; s < a.S; ++s) {
        const int64_t at = axis * a.axis_stride + b * a.batch_stride + s * a.token_stride;
        const int64_t position = position_at(a, at);
        if (position < 0 || position >= a.rows) return false;
      }
    }
  }
  return true;
}

}  // namespace
}  // namespace swathe

using namespace swathe;

// Returns 0, 1 without memory, or 2 for a position outside the tables; then nothing is written.
SWATHE_API int32_t swathe_rotary(const void* packed) {
  Rotation a;
  std::memcpy(&a, packed, sizeof a);
  if (!within_tables(a)) return 2;
  const int64_t M = a.B * a.S, width = a.x_type == kFloat32 ? 4 : 2;
  const int64_t bytes = 2 * M * (a.q.count + a.k.count) * a.D * width;
  const int threads = threads_for(bytes, M, static_cast<int>(a.threads));
  std::unique_ptr<float[]> room(new (std::nothrow) float[threads * 2 * a.R]);
  if (!room) return 1;
  const auto rotate = SWATHE_HERE(rotate);
  parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      rotate(a, M * share / threads, M * (share + 1) / threads, room.get() + share * 2 * a.R);
    }
  });
  return 0;
}
