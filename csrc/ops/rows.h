// Rows in a tensor, for the kernels of every device.
#pragma once

#include <ATen/core/Tensor.h>

namespace nnfast {

// Rows and their distance in elements, where the last `ndim` dimensions of t lie one after another and the rest
// step evenly: a contiguous tensor, a slice of wider rows, one row expanded. Anything else is copied first.
struct Rows {
  at::Tensor tensor;
  int64_t stride;
};
inline Rows rows_of(const at::Tensor& t, int64_t size, int64_t ndim) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d >= t.dim() - ndim; --d) {
    if (sizes[d] != 1 && strides[d] != expected) return {t.contiguous(), size};
    expected *= sizes[d];
  }
  // The outer dimensions, from the innermost: each must continue where the one inside it ends.
  int64_t stride = size, count = 1;
  for (int64_t d = t.dim() - ndim - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (count == 1)
      stride = strides[d];
    else if (strides[d] != stride * count)
      return {t.contiguous(), size};
    count *= sizes[d];
  }
  return {t, stride};
}

}  // namespace nnfast
