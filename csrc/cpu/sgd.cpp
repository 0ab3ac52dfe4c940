// SGD on a CPU.
#include <torch/library.h>

#include "step.h"

namespace nnfast {
namespace {

Path served("sgd_");

void sgd_cpu(const SgdCall& a) {
  step_cpu(a, &Kernels::sgd, served, [&](double lr, double) {
    return SgdStep<double>(lr, a.weight_decay, a.momentum, a.dampening, a.nesterov);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CPU, m) { m.impl("sgd_", Flat<SgdCall, sgd_cpu>::call); }

}  // namespace nnfast
