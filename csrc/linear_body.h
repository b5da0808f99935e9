// The body that linear.cpp compiles for each instruction set.
#include "gemm.h"
#include "sums.h"
#include "linear_rows.h"
