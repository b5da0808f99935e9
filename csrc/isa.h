// Instruction sets: every op is compiled once for each, and one is chosen at every call.
#pragma once

#include <atomic>

namespace swathe {

enum Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The widest set that this processor runs.
inline Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return kAvx512;
  }
  // every processor with AVX2 has F16C, which clang cannot be asked about
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kPortable;
}

// The set that swathe_use_isa asked for; negative: the best.
inline std::atomic<int> asked_isa{-1};

// The set that ops use: the best, or a narrower one that was asked for.
inline Isa isa() {
  static const Isa best = best_isa();
  const int asked = asked_isa.load(std::memory_order_relaxed);
  return asked >= 0 && asked < best ? static_cast<Isa>(asked) : best;
}

}  // namespace swathe
