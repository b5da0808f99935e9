// What a call of attention is given, and how its rows are cut into blocks; see attention.cpp.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace swathe {
namespace {

// Strides in elements; features are adjacent.
struct Strides {
  int64_t b, h, t;
};

// What a forward is given, as kernels/attention/_cpp.py packs it; every field takes 8 bytes. What a
// call does not have is null. With a `table`, k and v are caches in pages and b counts pages.
struct Forward {
  const void *q, *k, *v;
  void* o;
  float* lse;
  const int32_t *first, *last, *places;
  const uint8_t *keys, *allowed;
  const void* bias;
  const float *sinks, *alibi;
  const int32_t* table;
  int64_t type, bias_type, B, H, K, T, S, D, E;
  Strides q_at, k_at, v_at, o_at;
  int64_t bounds_b, bounds_t, places_b, keys_b, alibi_b, table_b, page;
  int64_t allowed_at[4], bias_at[4];
  int64_t threads;
  double scale, softcap, lowest;
};

// What a backward is given on top of that.
struct Attention : Forward {
  const void* dO;
  const float* dlse;
  void *dq, *dk, *dv, *dbias;
  float* stats;
  Strides do_at, dq_at, dk_at, dv_at;
  int64_t span, bias_size[4];
};

constexpr int64_t kRows = 64;    // query rows of a block, the lanes of its vectors
constexpr int64_t kKeys = 128;   // keys of a tile
constexpr int64_t kSuper = 384;  // keys whose gradients are formed together
constexpr int64_t kSplit = 512;  // keys of a part of a decoding row
constexpr double kLog2e = 1.4426950408889634;

// Query rows that share keys: row r is token (row0 + r) / group of head + (row0 + r) % group.
struct Block {
  int64_t b, kv, head, group, row0, rows;

  int64_t token(int64_t r) const { return (row0 + r) / group; }
  int64_t head_of(int64_t r) const { return head + (row0 + r) % group; }
};

// A part of some decoding rows: o (rows, E) not yet divided by the sums, their maxima and sums.
struct RowsPart {
  float *o, *max, *sum;
};

constexpr int64_t blocks_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

// Floats of scratch a thread needs, each part a multiple of a cache line.
constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

struct Room {
  // rows of a block, transposed: features x rows, or keys x rows
  float *qT, *sT, *pT, *doT, *oT;
  // rows as they are, widened
  float *rows_q, *rows_do, *keys, *values, *line, *slopes;
  // one number a row
  float *max, *sum, *slope, *place, *lse, *delta, *alpha;
  int32_t *first, *last;
  // gradients of kSuper keys
  float *dk, *dv;

  // Lays the parts out from `base`, or only counts for a null; returns how many floats they take.
  static int64_t place_parts(Room* room, float* base, const Attention& a, bool backward) {
    const int64_t D = padded(a.D), E = padded(a.E);
    int64_t taken = 0;
    auto take = [&](int64_t floats) {
      float* part = base ? base + taken : nullptr;
      taken += padded(floats);
      return part;
    };
    room->qT = take(D * kRows);
    room->sT = take(kKeys * kRows);
    room->oT = take((D > E ? D : E) * kRows);
    room->keys = take(kKeys * D);
    room->values = take(kKeys * E);
    room->line = take(D > E ? D : E);
    for (float** row : {&room->max, &room->sum, &room->slope, &room->place, &room->lse,
                        &room->delta, &room->alpha}) {
      *row = take(kRows);
    }
    room->first = reinterpret_cast<int32_t*>(take(kRows));
    room->last = reinterpret_cast<int32_t*>(take(kRows));
    if (backward) {
      room->doT = take(E * kRows);
      room->pT = take(kKeys * kRows);
      room->slopes = take(a.softcap != 0.0 ? kKeys * kRows : 0);
      room->rows_q = take(kRows * D);
      room->rows_do = take(kRows * E);
      room->dk = take(kSuper * D);
      room->dv = take(kSuper * E);
    }
    return taken;
  }
};

}  // namespace
}  // namespace swathe
