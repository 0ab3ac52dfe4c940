// SGD on a CUDA device.
#include <torch/library.h>

#include "optimizer.h"

namespace nnfast::cuda {
namespace {

void sgd_cuda(const SgdCall& c) {
  step_cuda<Sgd>(
      c, sgd, [&](double lr, double) { return Sgd{{lr, c.weight_decay, c.momentum, c.dampening, c.nesterov}}; });
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CUDA, m) { m.impl("sgd_", Flat<SgdCall, sgd_cuda>::call); }

}  // namespace nnfast::cuda
