// Instruction sets: every op is compiled once for each, and one is chosen when the library is loaded.
#pragma once

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
  if (__builtin_cpu_supports("avx2")) return kAvx2;
#endif
  return kPortable;
}

// `asked` if this processor runs it, else the best; a negative number asks for the best.
inline Isa use_isa(int asked) {
  static const Isa best = best_isa();
  return asked >= 0 && asked < best ? static_cast<Isa>(asked) : best;
}

}  // namespace swathe
