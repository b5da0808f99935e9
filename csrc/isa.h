// Instruction sets: every op is compiled once for each, and one is chosen at every call.
#pragma once

#include <atomic>

// SWATHE_PORTABLE_ONLY leaves the sets of x86 out, so that any machine's tests see the code that
// other processors get.
#if defined(__x86_64__) && !defined(SWATHE_PORTABLE_ONLY)
#define SWATHE_X86 1
#else
#define SWATHE_X86 0
#endif

namespace swathe {

enum Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The widest set that this processor runs.
inline Isa best_isa() {
#if SWATHE_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return kAvx512;
  }
  // every processor with AVX2 and FMA has F16C, which clang cannot be asked about
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

// Whether the instructions on bf16 pairs that came after AVX-512 are there.
inline bool has_bf16_pairs() {
#if SWATHE_X86
  static const bool found = __builtin_cpu_supports("avx512bf16");
  return found;
#else
  return false;
#endif
}

}  // namespace swathe
