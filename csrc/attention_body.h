// The body that attention.cpp compiles for each instruction set, and the table it calls it by.
#include "gemm.h"
#include "sums.h"
#include "vec_math.h"
#include "attention_tiles.h"
#include "attention_forward.h"
#include "attention_decode.h"
#include "attention_backward.h"

template <class X>
constexpr AttentionIsa functions_of() {
  return {lanes,          forward_block<X>,  decode_part<X>,  join_parts<X>,
          backward_rows<X>, backward_keys<X>, backward_bias<X>};
}

static const AttentionIsa& attention_for(int64_t type) {
  static constexpr AttentionIsa tables[] = {functions_of<float>(), functions_of<bf16>(),
                                            functions_of<f16>()};
  return tables[type];
}
