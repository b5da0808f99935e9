// What the library says about itself.
#include "abi.h"
#include "isa.h"

SWATHE_API int32_t swathe_abi_version() { return SWATHE_ABI_VERSION; }

// Number of the instruction set in use: 0 portable, 1 AVX2, 2 AVX-512.
SWATHE_API int32_t swathe_isa() { return swathe::isa(); }

// Makes every op use a narrower set than the widest, for tests; a negative number ends it.
SWATHE_API int32_t swathe_use_isa(int32_t asked) {
  swathe::asked_isa.store(asked, std::memory_order_relaxed);
  return 0;
}

// 1 if the library was compiled with OpenMP, else every call runs on one thread.
SWATHE_API int32_t swathe_threaded() {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}
