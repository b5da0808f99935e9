// Compiles the file SWATHE_BODY once for each instruction set, in a namespace of that name.
//
// Define SWATHE_BODY before including this. The body marks its functions SWATHE_TARGET (or
// SWATHE_INLINE for helpers, SWATHE_METHOD for those in structs) and uses the vectors of vec.h.
// Lambdas do not inherit a target: a body has them only to choose types. Threads stay outside.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"
#if SWATHE_X86
#pragma GCC diagnostic push
// about intrinsics whose result is filled later
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define SWATHE_METHOD SWATHE_TARGET inline __attribute__((always_inline))
#define SWATHE_INLINE SWATHE_TARGET static inline __attribute__((always_inline))

#define SWATHE_TARGET
#define SWATHE_LANES 4
#define SWATHE_F16C 0
namespace swathe {
namespace portable {
namespace {
#include "vec.h"
#include SWATHE_BODY
}  // namespace
}  // namespace portable
}  // namespace swathe
#undef SWATHE_TARGET
#undef SWATHE_LANES
#undef SWATHE_F16C

#if SWATHE_X86
#define SWATHE_TARGET __attribute__((target("avx2,fma,f16c")))
#define SWATHE_LANES 8
#define SWATHE_F16C 1
namespace swathe {
namespace avx2 {
namespace {
#include "vec.h"
#include SWATHE_BODY
}  // namespace
}  // namespace avx2
}  // namespace swathe
#undef SWATHE_TARGET
#undef SWATHE_LANES
#undef SWATHE_F16C

#define SWATHE_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")))
#define SWATHE_LANES 16
#define SWATHE_F16C 1
namespace swathe {
namespace avx512 {
namespace {
#include "vec.h"
#include SWATHE_BODY
}  // namespace
}  // namespace avx512
}  // namespace swathe
#undef SWATHE_TARGET
#undef SWATHE_LANES
#undef SWATHE_F16C
#endif

// `name`, a function or table of the body, for the instruction set in use.
#if SWATHE_X86
#define SWATHE_HERE(name)                      \
  (isa() == kAvx512 ? avx512::name             \
                    : isa() == kAvx2 ? avx2::name : portable::name)
#else
#define SWATHE_HERE(name) portable::name
#endif

#undef SWATHE_INLINE
#undef SWATHE_METHOD
