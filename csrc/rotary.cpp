// Rotary embedding: arguments, threads and the C entry point. The arithmetic is in rotary_rows.h.
#include <cstring>
#include <memory>
#include <new>

#include "abi.h"
#include "angles.h"
#include "choose.h"
#include "isa.h"
#include "parallel.h"

namespace swathe {
namespace {

// Arguments as kernels/rotary/_cpp.py packs them; every field takes 8 bytes.
struct Rotation {
  Turning turning;
  Heads q, k;
  int64_t x_type, B, S, D, round, back, threads;
};

}  // namespace
}  // namespace swathe

#define SWATHE_BODY "rotary_rows.h"
#include "each_isa.h"

using namespace swathe;

// Returns 0, 1 without memory, or 2 for a position outside the tables; then nothing is written.
SWATHE_API int32_t swathe_rotary(const void* packed) {
  Rotation a;
  std::memcpy(&a, packed, sizeof a);
  if (!within_tables(a.turning, a.B, a.S)) return 2;
  const int64_t M = a.B * a.S, R = a.turning.R;
  const int64_t bytes = 2 * M * (a.q.count + a.k.count) * a.D * width(a.x_type);
  const int threads = threads_for(bytes, M, static_cast<int>(a.threads));
  std::unique_ptr<float[]> room(new (std::nothrow) float[threads * 2 * R]);
  if (!room) return 1;
  const auto rotate = SWATHE_HERE(rotate);
  parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      rotate(a, M * share / threads, M * (share + 1) / threads, room.get() + share * 2 * R);
    }
  });
  return 0;
}
