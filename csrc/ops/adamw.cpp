// The contract of the AdamW step: schema and which calls are covered. It has no gradient.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "op.h"

namespace nnfast {

TORCH_LIBRARY_FRAGMENT(nnfast, m) {
  // One step for all parameters of a group: state_steps advance by one, unless found_inf is not zero, when nothing
  // changes. max_exp_avg_sqs is empty without amsgrad. Where grad_scale is given, grads are divided by it in place.
  // tensor_lr: the learning rate is one number on the parameters' device.
#define NNFAST_ADAMW(name, Lr)                                                                      \
  name "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs," \
       " Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] state_steps, *, " Lr                            \
       " lr, float beta1, float beta2,"                                                             \
       " float weight_decay, float eps, bool maximize, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
  m.def(NNFAST_ADAMW("adamw_", "float"));
  m.def(NNFAST_ADAMW("adamw_.tensor_lr", "Tensor"));
#undef NNFAST_ADAMW
}

void adamw_(
    at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
    at::TensorList max_exp_avg_sqs, at::TensorList state_steps, double lr, double beta1, double beta2,
    double weight_decay, double eps, bool maximize, const OptTensor& grad_scale, const OptTensor& found_inf) {
  static const auto op = find_op<decltype(adamw_)>("adamw_");
  op.call(
      params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, lr, beta1, beta2, weight_decay, eps, maximize,
      grad_scale, found_inf);
}

void adamw_tensor_lr(
    at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
    at::TensorList max_exp_avg_sqs, at::TensorList state_steps, const Tensor& lr, double beta1, double beta2,
    double weight_decay, double eps, bool maximize, const OptTensor& grad_scale, const OptTensor& found_inf) {
  static const auto op = find_op<decltype(adamw_tensor_lr)>("adamw_", "tensor_lr");
  op.call(
      params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, lr, beta1, beta2, weight_decay, eps, maximize,
      grad_scale, found_inf);
}

bool covers_adamw(
    const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
    const Tensor& max_exp_avg_sq, const Tensor& step, bool mixed_dtypes) {
  const auto type = param.scalar_type();
  const auto single = [](at::ScalarType t) { return t == at::kFloat || t == at::kBFloat16 || t == at::kHalf; };
  if (!single(type) && (type != at::kDouble || !param.is_cpu())) return false;
  // torch keeps the step on the CPU, or with the parameter where it is capturable or fused.
  if (step.scalar_type() != at::kFloat || step.numel() != 1) return false;
  if (!step.device().is_cpu() && step.device() != param.device()) return false;
  // The state lies in memory as the parameter does, without gaps; the gradient may lie in another order.
  const auto like = [&](const Tensor& t) {
    const bool same = t.scalar_type() == type || (mixed_dtypes && single(type) && single(t.scalar_type()));
    return same && t.device() == param.device() && t.sizes() == param.sizes();
  };
  const auto beside = [&](const Tensor& t) {
    return like(t) && t.strides() == param.strides() && t.scalar_type() == exp_avg.scalar_type();
  };
  return param.is_non_overlapping_and_dense() && like(grad) && beside(exp_avg) && beside(exp_avg_sq) &&
         (!max_exp_avg_sq.defined() || beside(max_exp_avg_sq));
}

namespace {

template <class Lr>
using AdamW = void(
    at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList, Lr, double, double,
    double, double, bool, const OptTensor&, const OptTensor&);

template <class Lr>
void adamw_meta(
    at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList, Lr, double, double,
    double, double, bool, const OptTensor&, const OptTensor&) {}

// What torch's own in-place ops do around the change: refuse a leaf that is being recorded, and count the version up,
// so that a graph which saved the old value notices.
template <class Lr, AdamW<Lr> op>
void adamw_autograd(
    at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
    at::TensorList max_exp_avg_sqs, at::TensorList state_steps, Lr lr, double beta1, double beta2, double weight_decay,
    double eps, bool maximize, const OptTensor& grad_scale, const OptTensor& found_inf) {
  if (at::GradMode::is_enabled())
    for (const auto& p : params) torch::autograd::check_inplace(p, p.requires_grad());
  at::AutoDispatchBelowADInplaceOrView guard;
  op(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, lr, beta1, beta2, weight_decay, eps, maximize,
     grad_scale, found_inf);
  const auto changed = [](at::TensorList list) {
    for (const auto& t : list)
      if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  };
  for (const auto& list : {params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps}) changed(list);
  if (defined(grad_scale)) changed(grads);
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, Meta, m) {
  m.impl("adamw_", adamw_meta<double>);
  m.impl("adamw_.tensor_lr", adamw_meta<const Tensor&>);
}
TORCH_LIBRARY_IMPL(nnfast, Autograd, m) {
  m.impl("adamw_", adamw_autograd<double, adamw_>);
  m.impl("adamw_.tensor_lr", adamw_autograd<const Tensor&, adamw_tensor_lr>);
}

}  // namespace nnfast
