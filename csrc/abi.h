// The library's C ABI: what Python may call, and the version that both sides must agree on.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define SWATHE_API extern "C" __declspec(dllexport)
#else
#define SWATHE_API extern "C" __attribute__((visibility("default")))
#endif

// Raised whenever a signature or an argument's meaning changes; kernels/core/cpp.py repeats it.
#define SWATHE_ABI_VERSION 8

namespace swathe {

// Codes of storage types as Python passes them.
enum Type : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kNone = 3 };

// 16-bit floats are storage only: they are widened to fp32 on load and rounded once on store.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace swathe
