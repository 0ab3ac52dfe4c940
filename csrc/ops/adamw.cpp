// The contract of the step of Adam and AdamW: its schema. It has no gradient.
#include <torch/library.h>

#include "optimizer.h"

namespace nnfast {

TORCH_LIBRARY_FRAGMENT(nnfast, m) {
  // One step for all parameters of a group: state_steps advance by one. Where found_inf is not zero, nothing changes.
  // max_exp_avg_sqs is empty without amsgrad. master_params is empty, or has of each bfloat16 parameter the low 16 bits
  // of its float value as int16 (csrc/cpu/optimizer.h). tensor_lr, where given, replaces lr. grads are divided by
  // grad_scale in place, where that is given; clip_coef multiplies them as they are read. With rounding_seed, bfloat16
  // params and exp_avg_sqs are rounded stochastically.
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
      " Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] master_params, Tensor(g!)[] state_steps, *, float lr, float beta1,"
      " float beta2, float weight_decay, float eps, bool decoupled_weight_decay=True, bool maximize=False,"
      " Tensor? tensor_lr=None, Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? clip_coef=None,"
      " int? rounding_seed=None) -> ()");
}
TORCH_LIBRARY_IMPL(nnfast, Meta, m) { m.impl("adamw_", Flat<AdamWCall, step_meta>::call); }
TORCH_LIBRARY_IMPL(nnfast, Autograd, m) { m.impl("adamw_", Flat<AdamWCall, step_autograd>::call); }

}  // namespace nnfast
