// Attention: tasks, threads and the C entry points. The arithmetic is in attention_*.h.
//
// Every task writes rows of its own and depends on shapes alone, never on threads: results are the
// same bits with any number of them. Tasks are taken one at a time, from the last rows on, which
// see most under a causal mask.
#include "attention.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "abi.h"
#include "isa.h"
#include "parallel.h"

namespace swathe {
namespace {

// An instruction set's functions for one storage type.
struct AttentionIsa {
  int64_t lanes;
  void (*forward)(const Attention&, const Block&, Room&);
  void (*decode)(const Attention&, const Block&, int64_t, int64_t, const RowsPart&, Room&);
  void (*join)(const Attention&, const Block&, const RowsPart*, int64_t, Room&);
  void (*backward_rows)(const Attention&, const Block&, Room&);
  void (*backward_keys)(const Attention&, int64_t, int64_t, int64_t, int64_t, Room&);
  void (*backward_bias)(const Attention&, int64_t, int64_t, int64_t, float*, Room&);
};

}  // namespace
}  // namespace swathe

#define SWATHE_BODY "attention_body.h"
#include "each_isa.h"

namespace swathe {
namespace {

constexpr int64_t kWorkPerThread = 1 << 18;  // multiplications, below which one thread is enough

// Runs work(task, room) over the threads; returns 0, or 1 where one found no memory for its room.
template <class Work>
int32_t run(const Attention& a, int64_t tasks, bool backward, int64_t more, const Work& work) {
  Room counted;
  const int64_t floats = Room::place_parts(&counted, nullptr, a, backward) + more + 16;
  const double products = static_cast<double>(a.B * a.H * a.T) * a.S * (a.D + a.E);
  const double worth = products / kWorkPerThread + 1;
  const int64_t most = std::min<int64_t>(tasks, a.threads);
  const int threads = worth < most ? static_cast<int>(worth) : static_cast<int>(most);
  std::atomic<int32_t> failed{0};
  parallel_tasks(tasks, std::max(threads, 1), [&](int64_t task) {
    float* base = scratch(floats);
    if (base == nullptr) {
      failed = 1;
      return;
    }
    Room room;
    const int64_t taken = Room::place_parts(&room, base, a, backward);
    work(task, room, base + taken);
  });
  return failed;
}

// Block `task` of all sequences and key heads, the last rows first.
Block block_of(const Attention& a, int64_t task) {
  const int64_t pairs = a.B * a.K, group = a.H / a.K, rows = a.T * group;
  const int64_t row = (blocks_of(rows) - 1 - task / pairs) * kRows, pair = task % pairs;
  const int64_t kv = pair % a.K;
  return {pair / a.K, kv, kv * group, group, row, std::min(kRows, rows - row)};
}

// The arguments of a forward, or with `backward` those of a backward.
Attention unpacked(const void* packed, bool backward) {
  Attention a = {};
  std::memcpy(static_cast<void*>(&a), packed, backward ? sizeof(Attention) : sizeof(Forward));
  return a;
}

int64_t all_blocks(const Attention& a) { return a.B * a.K * blocks_of(a.T * (a.H / a.K)); }

}  // namespace
}  // namespace swathe

using namespace swathe;

// All return 0, or 1 without memory. Sizes are not 0, but S may be.
SWATHE_API int32_t swathe_attention_forward(const void* packed) {
  const Attention a = unpacked(packed, false);
  const AttentionIsa& here = SWATHE_HERE(attention_for)(a.type);
  return run(a, all_blocks(a), false, 0, [&](int64_t task, Room& room, float*) {
    here.forward(a, block_of(a, task), room);
  });
}

// Few rows against many keys, which are cut into parts whose results are joined.
SWATHE_API int32_t swathe_attention_decode(const void* packed) {
  const Attention a = unpacked(packed, false);
  const AttentionIsa& here = SWATHE_HERE(attention_for)(a.type);
  const int64_t group = a.H / a.K, rows = a.T * group;
  if (rows > here.lanes) return swathe_attention_forward(packed);
  const int64_t count = std::max<int64_t>(1, (a.S + kSplit - 1) / kSplit), pairs = a.B * a.K;
  const int64_t floats = rows * (a.E + 2);
  std::unique_ptr<float[]> results(new (std::nothrow) float[pairs * count * floats]);
  std::unique_ptr<RowsPart[]> parts(new (std::nothrow) RowsPart[pairs * count]);
  if (!results || !parts) return 1;
  for (int64_t i = 0; i < pairs * count; ++i) {
    float* at = results.get() + i * floats;
    parts[i] = {at, at + rows * a.E, at + rows * (a.E + 1)};
  }
  auto block = [&](int64_t pair) {
    const int64_t kv = pair % a.K;
    return Block{pair / a.K, kv, kv * group, group, 0, rows};
  };
  const int32_t failed = run(a, pairs * count, false, 0, [&](int64_t task, Room& room, float*) {
    const int64_t begin = task % count * kSplit;
    here.decode(a, block(task / count), begin, begin + kSplit, parts[task], room);
  });
  if (failed) return failed;
  return run(a, pairs, false, 0, [&](int64_t pair, Room& room, float*) {
    here.join(a, block(pair), parts.get() + pair * count, count, room);
  });
}

// dq and stats, then dk and dv.
SWATHE_API int32_t swathe_attention_backward(const void* packed) {
  const Attention a = unpacked(packed, true);
  const AttentionIsa& here = SWATHE_HERE(attention_for)(a.type);
  const int32_t failed = run(a, all_blocks(a), true, 0, [&](int64_t task, Room& room, float*) {
    here.backward_rows(a, block_of(a, task), room);
  });
  if (failed) return failed;
  const int64_t pairs = a.B * a.K, supers = (a.S + kSuper - 1) / kSuper;
  return run(a, pairs * supers, true, 0, [&](int64_t task, Room& room, float*) {
    // the first keys, which most rows see, come first
    const int64_t begin = task / pairs * kSuper, pair = task % pairs;
    here.backward_keys(a, pair / a.K, pair % a.K, begin, std::min(begin + kSuper, a.S), room);
  });
}

SWATHE_API int32_t swathe_attention_backward_bias(const void* packed) {
  const Attention a = unpacked(packed, true);
  const AttentionIsa& here = SWATHE_HERE(attention_for)(a.type);
  const int64_t blocks = a.bias_size[2] > 1 ? (a.T + kRows - 1) / kRows : 1;
  const int64_t planes = a.bias_size[0] * a.bias_size[1];
  return run(a, planes * blocks, true, kRows * a.S, [&](int64_t task, Room& room, float* total) {
    const int64_t plane = task % planes, token = task / planes * kRows;
    here.backward_bias(a, plane / a.bias_size[1], plane % a.bias_size[1], token, total, room);
  });
}
