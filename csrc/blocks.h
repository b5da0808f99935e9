// Rows in blocks, for sums over rows; and which outputs go past the caches.
#pragma once

#include <algorithm>
#include <cstdint>

namespace swathe {

// Blocks into which the sums over M rows are split. Their number depends on M alone: with any
// number of threads the additions are the same ones in the same order. Past 2048 rows a block has
// 32: longer chains of fp32 additions lose accuracy.
inline int64_t blocks_of(int64_t M) {
  return std::max<int64_t>(std::min<int64_t>(64, (M + 7) / 8), (M + 31) / 32);
}

// Whether an output is stored past the caches: it would leave them before anyone reads it again.
// From 32 MiB on malloc maps fresh pages, which the kernel has just zeroed in the caches; there a
// plain store is faster (measured: 10 % at 64 MiB, where streaming wins 5 to 20 % below 32 MiB).
constexpr bool worth_streaming(int64_t bytes) {
  return bytes >= int64_t{8} << 20 && bytes < int64_t{32} << 20;
}

}  // namespace swathe
