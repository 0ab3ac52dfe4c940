// The contracts of a norm over many tensors, and of their scaling. Neither has a gradient.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "optimizer.h"

namespace nnfast {

TORCH_LIBRARY_FRAGMENT(nnfast, m) {
  // The norm of all tensors as one vector, in float64: norm_type 2 or infinity.
  m.def("total_norm(Tensor[] tensors, float norm_type) -> Tensor");
  // Each is multiplied by the factor.
  m.def("scale_(Tensor(a!)[] tensors, float factor) -> ()");
}

Tensor total_norm(at::TensorList tensors, double norm_type) {
  static const auto op = find_op<decltype(total_norm)>("total_norm");
  return op.call(tensors, norm_type);
}
void scale_(at::TensorList tensors, double factor) {
  static const auto op = find_op<decltype(scale_)>("scale_");
  op.call(tensors, factor);
}

bool covers_clip(const Tensor& t) {
  const auto type = t.scalar_type();
  return t.is_cpu() && t.is_non_overlapping_and_dense() &&
         (type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf);
}

namespace {

Tensor total_norm_meta(at::TensorList tensors, double) {
  TORCH_CHECK(!tensors.empty(), "nnfast::total_norm wants a tensor");
  return at::empty({}, tensors[0].options().dtype(at::kDouble));
}
Tensor total_norm_autograd(at::TensorList tensors, double norm_type) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return total_norm(tensors, norm_type);
}
void scale_meta(at::TensorList, double) {}
void scale_autograd(at::TensorList tensors, double factor) {
  check_in_place(tensors);
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    scale_(tensors, factor);
  }
  count_version(tensors);
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, Meta, m) {
  m.impl("total_norm", total_norm_meta);
  m.impl("scale_", scale_meta);
}
TORCH_LIBRARY_IMPL(nnfast, Autograd, m) {
  m.impl("total_norm", total_norm_autograd);
  m.impl("scale_", scale_autograd);
}

}  // namespace nnfast
