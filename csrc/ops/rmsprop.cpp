// The contract of the step of RMSprop: its schema. It has no gradient.
#include <torch/library.h>

#include "optimizer.h"

namespace nnfast {

TORCH_LIBRARY_FRAGMENT(nnfast, m) {
  // One step for all parameters of a group: state_steps advance by one. momentum_buffers is empty without momentum,
  // grad_avgs where the gradient is not centered. tensor_lr, where given, replaces lr.
  m.def(
      "rmsprop_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] square_avgs, Tensor(d!)[] momentum_buffers,"
      " Tensor(e!)[] grad_avgs, Tensor(f!)[] state_steps, *, float lr, float alpha, float eps, float weight_decay,"
      " float momentum, bool centered=False, bool maximize=False, Tensor? tensor_lr=None) -> ()");
}
TORCH_LIBRARY_IMPL(nnfast, Meta, m) { m.impl("rmsprop_", Flat<RMSpropCall, step_meta>::call); }
TORCH_LIBRARY_IMPL(nnfast, Autograd, m) { m.impl("rmsprop_", Flat<RMSpropCall, step_autograd>::call); }

}  // namespace nnfast
