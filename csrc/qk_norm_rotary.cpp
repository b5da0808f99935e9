// RMSNorm of heads, then rotary: arguments, threads and the C entry points. The arithmetic is in
// qk_norm_rows.h.
#include <cstring>
#include <memory>
#include <new>

#include "abi.h"
#include "angles.h"
#include "blocks.h"
#include "choose.h"
#include "isa.h"
#include "parallel.h"

namespace swathe {
namespace {

// What is rounded before y is: nothing; h; h and the products of the rotation; xhat and h; all.
// kernels/qk_norm_rotary/_cpp.py: _rounding.
enum Rounding : int64_t { kOnce = 0, kHead, kProductsToo, kXhat, kXhatAndProducts };

// The heads of q or of k (going backward, y is dx), their gradient and their weight.
struct NormedHeads {
  Heads heads;
  const void* dy;
  int64_t dy_b, dy_h, dy_s;
  const void* weight;
  float* scale;  // filled here
};

// Arguments as kernels/qk_norm_rotary/_cpp.py packs them; every field takes 8 bytes.
struct Normed {
  Turning turning;
  NormedHeads q, k;
  void* dw;
  int64_t x_type, w_type, B, S, D, rounding, threads;
  double eps, offset;
};

// What one thread works in: a token's angles (R each), a head (D).
struct Room {
  float *c, *s, *head;
};

struct QkNormIsa {
  void (*forward)(const Normed&, int64_t, int64_t, const Room&);
  void (*backward)(const Normed&, int64_t, int64_t, const Room&, float*);
  void (*prepare)(const void*, int64_t, float, float, float*, int64_t);
  void (*finish)(const float*, int64_t, int64_t, void*, int64_t);
};

}  // namespace
}  // namespace swathe

#define SWATHE_BODY "qk_norm_rows.h"
#include "each_isa.h"

namespace swathe {
namespace {

// The scratch of all threads: both scales, then a Room for each.
std::unique_ptr<float[]> rooms(const Normed& a, int threads) {
  const int64_t each = 2 * a.turning.R + a.D;
  return std::unique_ptr<float[]>(new (std::nothrow) float[2 * a.D + threads * each]);
}

Room room_of(const Normed& a, float* scratch, int64_t thread) {
  float* c = scratch + 2 * a.D + thread * (2 * a.turning.R + a.D);
  return {c, c + a.turning.R, c + 2 * a.turning.R};
}

void prepare_scales(Normed& a, const QkNormIsa& norm, float* scratch) {
  a.q.scale = scratch;
  a.k.scale = scratch + a.D;
  norm.prepare(a.q.weight, a.w_type, static_cast<float>(a.offset), 1, a.q.scale, a.D);
  norm.prepare(a.k.weight, a.w_type, static_cast<float>(a.offset), 1, a.k.scale, a.D);
}

int64_t bytes_of(const Normed& a) {
  return a.B * a.S * (a.q.heads.count + a.k.heads.count) * a.D * width(a.x_type);
}

}  // namespace
}  // namespace swathe

using namespace swathe;

// Both return 0, 1 without memory, or 2 for a position outside the tables; then nothing is written.
SWATHE_API int32_t swathe_qk_norm_rotary_forward(const void* packed) {
  Normed a;
  std::memcpy(&a, packed, sizeof a);
  if (!within_tables(a.turning, a.B, a.S)) return 2;
  const QkNormIsa& norm = SWATHE_HERE(table);
  const int64_t M = a.B * a.S;
  const int threads = threads_for(2 * bytes_of(a), M, static_cast<int>(a.threads));
  const auto scratch = rooms(a, threads);
  if (!scratch) return 1;
  prepare_scales(a, norm, scratch.get());
  parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      norm.forward(a, M * share / threads, M * (share + 1) / threads,
                   room_of(a, scratch.get(), share));
    }
  });
  return 0;
}

// dw: D sums for q, then D for k where there is one.
SWATHE_API int32_t swathe_qk_norm_rotary_backward(const void* packed) {
  Normed a;
  std::memcpy(&a, packed, sizeof a);
  if (!within_tables(a.turning, a.B, a.S)) return 2;
  const QkNormIsa& norm = SWATHE_HERE(table);
  const int64_t M = a.B * a.S, heads = a.q.heads.count + a.k.heads.count;
  const int64_t blocks = std::min(M, blocks_of(M * heads));
  const int64_t sums = a.k.heads.x == nullptr ? a.D : 2 * a.D;
  const int threads = threads_for(3 * bytes_of(a), blocks, static_cast<int>(a.threads));
  const auto scratch = rooms(a, threads);
  std::unique_ptr<float[]> partial(new (std::nothrow) float[blocks * sums]());
  if (!scratch || !partial) return 1;
  prepare_scales(a, norm, scratch.get());
  parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      const Room room = room_of(a, scratch.get(), share);
      const int64_t stop = blocks * (share + 1) / threads;
      for (int64_t block = blocks * share / threads; block < stop; ++block) {
        norm.backward(a, M * block / blocks, M * (block + 1) / blocks, room,
                      partial.get() + block * sums);
      }
    }
  });
  norm.finish(partial.get(), blocks, a.w_type, a.dw, sums);
  return 0;
}
