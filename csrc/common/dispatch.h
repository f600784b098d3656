// Run-time dtype -> a lambda that receives a value of the C++ type (use decltype).
#pragma once

#include <type_traits>

#include "common/check.h"
#include "common/half.h"
#include "common/view.h"

namespace kd {

template <class Fn>
void dispatch_half_float(DType dtype, const char* argument, Fn&& fn) {
  switch (dtype) {
    case DType::kFloat32:
      return fn(float{});
    case DType::kFloat16:
      return fn(f16{});
    case DType::kBFloat16:
      return fn(bf16{});
    default:
      detail::fail(argument, ": expected float32, float16 or bfloat16, got ", name(dtype));
  }
}

template <class Fn>
void dispatch_float(DType dtype, const char* argument, Fn&& fn) {
  if (dtype == DType::kFloat64) return fn(double{});
  dispatch_half_float(dtype, argument, fn);
}

template <class Fn>
void dispatch_bool(bool value, Fn&& fn) {
  if (value) {
    fn(std::true_type{});
  } else {
    fn(std::false_type{});
  }
}

}  // namespace kd
