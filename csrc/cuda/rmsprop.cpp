// RMSprop on a CUDA device.
#include <torch/library.h>

#include "optimizer.h"

namespace nnfast::cuda {
namespace {

void rmsprop_cuda(const RMSpropCall& c) {
  step_cuda<RMSprop>(
      c, rmsprop, [&](double lr, double) { return RMSprop{{lr, c.weight_decay, c.alpha, c.eps, c.momentum}}; });
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CUDA, m) { m.impl("rmsprop_", Flat<RMSpropCall, rmsprop_cuda>::call); }

}  // namespace nnfast::cuda
