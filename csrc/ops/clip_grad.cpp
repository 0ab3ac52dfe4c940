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
  // On a GPU, so that the CPU need not wait for a number: their norm, divided by grad_scale and rounded as torch rounds
  // it, and min(1, max_norm / (norm + 1e-6)) in float.
  m.def("clip_coef(Tensor[] tensors, float max_norm, Tensor? grad_scale=None) -> (Tensor, Tensor)");
  // Each is multiplied by the factor, one float on their device.
  m.def("scale_by_(Tensor(a!)[] tensors, Tensor factor) -> ()");
}

Tensor total_norm(at::TensorList tensors, double norm_type) {
  static const auto op = find_op<decltype(total_norm)>("total_norm");
  return op.call(tensors, norm_type);
}
void scale_(at::TensorList tensors, double factor) {
  static const auto op = find_op<decltype(scale_)>("scale_");
  op.call(tensors, factor);
}

std::tuple<Tensor, Tensor> clip_coef(at::TensorList tensors, double max_norm, const OptTensor& grad_scale) {
  static const auto op = find_op<decltype(clip_coef)>("clip_coef");
  return op.call(tensors, max_norm, grad_scale);
}
void scale_by_(at::TensorList tensors, const Tensor& factor) {
  static const auto op = find_op<decltype(scale_by_)>("scale_by_");
  op.call(tensors, factor);
}

bool covers_clip(const Tensor& t) {
  const auto type = t.scalar_type();
  return t.is_non_overlapping_and_dense() && !forbidden(t) &&
         (float_or_half(type) || (type == at::kDouble && t.is_cpu()));
}

at::ScalarType norm_dtype(at::TensorList tensors) {
  auto type = tensors[0].scalar_type();
  for (const auto& t : tensors) type = at::promoteTypes(type, t.scalar_type());
  return type;
}

namespace {

// The dispatcher refuses an empty list itself.
Tensor total_norm_meta(at::TensorList tensors, double) {
  return at::empty({}, tensors[0].options().dtype(at::kDouble));
}
Tensor total_norm_autograd(at::TensorList tensors, double norm_type) {
  return below_autograd(total_norm, tensors, norm_type);
}
void scale_meta(at::TensorList, double) {}
std::tuple<Tensor, Tensor> clip_coef_meta(at::TensorList tensors, double, const OptTensor&) {
  const auto options = tensors[0].options();
  return {at::empty({}, options.dtype(norm_dtype(tensors))), at::empty({}, options.dtype(at::kFloat))};
}
std::tuple<Tensor, Tensor> clip_coef_autograd(at::TensorList tensors, double max_norm, const OptTensor& grad_scale) {
  return below_autograd(clip_coef, tensors, max_norm, grad_scale);
}
void scale_by_meta(at::TensorList, const Tensor&) {}
void scale_by_autograd(at::TensorList tensors, const Tensor& factor) {
  in_place(tensors, [&] { scale_by_(tensors, factor); });
}
void scale_autograd(at::TensorList tensors, double factor) {
  in_place(tensors, [&] { scale_(tensors, factor); });
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, Meta, m) {
  m.impl("total_norm", total_norm_meta);
  m.impl("scale_", scale_meta);
  m.impl("clip_coef", clip_coef_meta);
  m.impl("scale_by_", scale_by_meta);
}
TORCH_LIBRARY_IMPL(nnfast, Autograd, m) {
  m.impl("total_norm", total_norm_autograd);
  m.impl("scale_", scale_autograd);
  m.impl("clip_coef", clip_coef_autograd);
  m.impl("scale_by_", scale_by_autograd);
}

}  // namespace nnfast
