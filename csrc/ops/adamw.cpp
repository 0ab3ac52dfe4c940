// The contract of the step of Adam and AdamW: its schema. It has no gradient.
#include <torch/library.h>

#include "optimizer.h"

namespace nnfast {

TORCH_LIBRARY_FRAGMENT(nnfast, m) {
  // One step for all parameters of a group: state_steps advance by one, unless found_inf is not zero, when nothing
  // changes. max_exp_avg_sqs is empty without amsgrad. master_params, or nothing: of a bfloat16 parameter, the low 16
  // bits of its float value, int16 (csrc/math/adamw.h). tensor_lr stands for lr. Where grad_scale is given, grads are
  // divided by it in place; clip_coef multiplies them as they are read. With rounding_seed, 16-bit parameters are
  // rounded stochastically.
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
