// What every optimizer's op asks: which tensors its kernels take, and what torch is told of the change.
#include "optimizer.h"

#include <torch/csrc/autograd/VariableTypeUtils.h>

namespace nnfast {

bool covers_step(
    const Tensor& param, const Tensor& grad, at::ArrayRef<const Tensor*> state, const Tensor* master,
    const Tensor* step, bool mixed_dtypes) {
  const auto type = param.scalar_type();
  if (!float_or_half(type) && (type != at::kDouble || !param.is_cpu())) return false;
  // torch keeps the step on the CPU, or with the parameter where it is capturable or fused.
  if (step) {
    if (step->scalar_type() != at::kFloat || step->numel() != 1 || forbidden(*step)) return false;
    if (!step->device().is_cpu() && step->device() != param.device()) return false;
  }
  if (!param.is_non_overlapping_and_dense() || forbidden(param)) return false;
  const auto there = [&](const Tensor& t) { return t.device() == param.device() && t.sizes() == param.sizes(); };
  // The gradient may lie in another order than the parameter.
  const auto of_grad = grad.scalar_type();
  if (!there(grad) || (of_grad != type && !(mixed_dtypes && float_or_half(type) && float_or_half(of_grad))))
    return false;
  // The state lies in memory as the parameter does, without gaps, all of it in one type: the parameter's, or float.
  const Tensor* first = nullptr;
  for (const Tensor* t : state) {
    if (!t || !t->defined()) continue;
    if (!first) first = t;
    const auto of_state = t->scalar_type();
    const bool known = of_state == type ||
                       (float_or_half(type) && (of_state == at::kFloat || (mixed_dtypes && float_or_half(of_state))));
    if (!known || of_state != first->scalar_type() || !there(*t) || t->strides() != param.strides() || forbidden(*t))
      return false;
  }
  if (master && master->defined())
    return type == at::kBFloat16 && param.is_cpu() && master->scalar_type() == at::kShort && there(*master) &&
           master->strides() == param.strides();
  return true;
}

void check_in_place(at::TensorList params) {
  if (at::GradMode::is_enabled())
    for (const auto& p : params) torch::autograd::check_inplace(p, p.requires_grad());
}

void count_version(at::TensorList changed) {
  for (const auto& t : changed)
    if (t.defined() && !t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

}  // namespace nnfast
