// Splits [0, count) over threads of the OpenMP runtime that the process has loaded already.
//
// The library is compiled with OpenMP but not linked to a runtime: its symbols bind to the one that
// torch brought along, so that there is one pool of threads and torch.set_num_threads governs it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

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

// Calls work(task) for every task below `count`, the next one whenever a thread is free.
template <class Work>
void parallel_tasks(int64_t count, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  parallel_for(threads, threads, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < count; task = next++) work(task);
  });
}

// This thread's scratch memory of at least so many floats, kept from call to call; null without.
// Each number has its own.
template <int number = 0>
float* scratch(int64_t floats) {
  static thread_local std::unique_ptr<float[]> kept;
  static thread_local int64_t size = 0;
  if (size < floats) {
    kept.reset();  // before the new one, so that there are never both
    kept.reset(new (std::nothrow) float[floats]);
    size = kept ? floats : 0;
  }
  return kept.get();
}

}  // namespace swathe
