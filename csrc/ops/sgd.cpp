// The contract of the step of SGD: its schema. It has no gradient.
#include <torch/library.h>

#include "optimizer.h"

namespace nnfast {

TORCH_LIBRARY_FRAGMENT(nnfast, m) {
  // One step for all parameters of a group. Where found_inf is not zero, nothing changes. momentum_buffers is empty
  // without momentum; with it, torch takes the first step, which makes them. tensor_lr, where given, replaces lr. grads
  // are divided by grad_scale in place, where that is given.
  m.def(
      "sgd_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, *, float lr, float momentum,"
      " float dampening, float weight_decay, bool nesterov=False, bool maximize=False, Tensor? tensor_lr=None,"
      " Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
}
TORCH_LIBRARY_IMPL(nnfast, Meta, m) { m.impl("sgd_", Flat<SgdCall, step_meta>::call); }
TORCH_LIBRARY_IMPL(nnfast, Autograd, m) { m.impl("sgd_", Flat<SgdCall, step_autograd>::call); }

}  // namespace nnfast
