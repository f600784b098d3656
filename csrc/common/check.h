// KD_CHECK: a failed precondition becomes std::invalid_argument (ValueError in Python) whose
// message carries the offending values.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "common/view.h"

namespace kd {

namespace detail {
template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}
}  // namespace detail

#define KD_CHECK(condition, ...)                       \
  do {                                                 \
    if (!(condition)) ::kd::detail::fail(__VA_ARGS__); \
  } while (0)

inline std::string shape_text(const View& view) {
  std::ostringstream text;
  text << '(';
  for (int i = 0; i < view.ndim; ++i) text << (i ? ", " : "") << view.shape[i];
  text << ')';
  return text.str();
}

// A dense row-major matrix whose rows may be strided (stride(0) is free, stride(1) is 1).
inline void check_rows(const View& view, const char* argument, int64_t rows, int64_t columns) {
  KD_CHECK(view.ndim == 2 && view.shape[0] == rows && view.shape[1] == columns, argument,
           ": expected shape (", rows, ", ", columns, "), got ", shape_text(view));
  KD_CHECK(columns <= 1 || view.stride[1] == 1, argument,
           ": the last dimension must be contiguous, got stride ", view.stride[1]);
}

// A vector of one number a row; stride 0 (expanded) is fine.
inline void check_per_row(const View& view, const char* argument, int64_t rows) {
  KD_CHECK(view.ndim == 1 && view.shape[0] == rows, argument, ": expected shape (", rows,
           ",), got ", shape_text(view));
}

inline void check_dtype(const View& view, const char* argument, DType dtype) {
  KD_CHECK(view.dtype == dtype, argument, ": expected ", name(dtype), ", got ", name(view.dtype));
}

}  // namespace kd
