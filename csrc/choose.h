// From codes that are known at run time to types and constants that a template takes.
//
// The function that is handed over only calls on; it is compiled for no instruction set of its own.
#pragma once

#include <type_traits>

#include "abi.h"

namespace swathe {

// Calls `f` with a value of the storage type; its decltype is what counts.
template <class F>
void with_type(int64_t type, const F& f) {
  switch (type) {
    case kFloat32:
      return f(float{});
    case kBFloat16:
      return f(bf16{});
    default:
      return f(f16{});
  }
}

template <class F>
void with_bool(bool value, const F& f) {
  if (value) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

// The type of a sum, by torch's rules: equal types keep theirs, different ones give fp32.
template <class A, class B>
using Promoted = std::conditional_t<std::is_same_v<A, B>, A, float>;

// Calls f(x, r, h, add) with values of the types of x, of r and of h = x + r; without r (kNone) h
// is x itself, and `add` is false.
template <class F>
void with_summands(int64_t x_type, int64_t r_type, const F& f) {
  with_type(x_type, [&](auto x) {
    if (r_type == kNone) return f(x, x, x, std::false_type{});
    with_type(r_type, [&](auto r) {
      f(x, r, Promoted<decltype(x), decltype(r)>{}, std::true_type{});
    });
  });
}

constexpr int64_t width(int64_t type) { return type == kFloat32 ? 4 : 2; }

}  // namespace swathe
