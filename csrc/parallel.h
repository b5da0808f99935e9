// Splits [0, count) over threads of the OpenMP runtime that the process has loaded already.
//
// The library is compiled with OpenMP but not linked to a runtime: its symbols bind to the one that
// torch brought along, so that there is one pool of threads and torch.set_num_threads governs it.
#pragma once

#include <algorithm>
#include <cstdint>

namespace swathe {

// Below this many bytes a second thread costs more than it saves.
constexpr int64_t kBytesPerThread = 1 << 16;

inline int threads_for(int64_t bytes, int64_t count, int available) {
  const int64_t worth = std::min<int64_t>(bytes / kBytesPerThread + 1, count);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(worth, available)));
}

// Calls work(begin, end) on equal shares; `work` must not throw.
template <class Work>
void parallel_for(int64_t count, int threads, const Work& work) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int share = 0; share < threads; ++share) {
      work(count * share / threads, count * (share + 1) / threads);
    }
    return;
  }
#endif
  work(0, count);
}

}  // namespace swathe
