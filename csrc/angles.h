// The angles of a rotation as kernels/core/cpp_rotation.py packs them; every field takes 8 bytes.
#pragma once

#include <cstdint>

namespace swathe {

// How the members of a pair find their entries in a table; kernels/core/rotation.py: FORM.
enum Form : int64_t { kHalves = 0, kCompact = 1, kPairs = 2 };

// Tables of cos and sin, and how tokens and pairs find their entries; strides in elements.
struct Turning {
  const void *cos, *sin, *positions;
  int64_t wide_positions;  // 1: int64, 0: int32
  int64_t axis_stride, batch_stride, token_stride, row_stride, rows, h_start, w_start;
  int64_t form, mrope, table_type, R, interleaved;
};

// The heads of q or of k, read at x and written at y; strides in elements.
struct Heads {
  const void* x;
  void* y;
  int64_t count, x_b, x_h, x_s, y_b, y_h, y_s;
};

inline int64_t position_at(const Turning& a, int64_t at) {
  return a.wide_positions ? static_cast<const int64_t*>(a.positions)[at]
                          : static_cast<const int32_t*>(a.positions)[at];
}

// Whether the positions of B sequences of S tokens are all rows of the tables.
inline bool within_tables(const Turning& a, int64_t B, int64_t S) {
  if (a.positions == nullptr) return true;
  const int64_t batches = a.batch_stride ? B : 1;
  for (int64_t axis = 0; axis < (a.mrope ? 3 : 1); ++axis) {
    for (int64_t b = 0; b < batches; ++b) {
      for (int64_t s = 0; s < S; ++s) {
        const int64_t at = axis * a.axis_stride + b * a.batch_stride + s * a.token_stride;
        const int64_t position = position_at(a, at);
        if (position < 0 || position >= a.rows) return false;
      }
    }
  }
  return true;
}

}  // namespace swathe
