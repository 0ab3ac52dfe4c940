// Tensors as the kernels of every device read them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <optional>

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

// t, or a copy without its gaps, whose dimensions follow each other in memory as t's do.
inline at::Tensor dense(const at::Tensor& t) { return t.is_non_overlapping_and_dense() ? t : t.clone(); }

// t, or a copy of it that lies in memory as `like` does, which has no gaps.
inline at::Tensor laid_out(const at::Tensor& t, const at::Tensor& like) {
  return t.strides() == like.strides() ? t : at::empty_like(like, t.options()).copy_(t);
}

// A weight that may be missing.
inline std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& t) {
  return t && t->defined() ? std::optional(t->contiguous()) : std::nullopt;
}
inline const void* data(const std::optional<at::Tensor>& t) {
  return t && t->defined() ? t->const_data_ptr() : nullptr;
}

}  // namespace nnfast
