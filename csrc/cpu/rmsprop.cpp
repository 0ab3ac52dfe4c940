// RMSprop on a CPU.
#include <torch/library.h>

#include "step.h"

namespace nnfast {
namespace {

Path served("rmsprop_");

void rmsprop_cpu(const RMSpropCall& a) {
  step_cpu(a, &Kernels::rmsprop, served, [&](double lr, double) {
    return RMSpropStep<double>(lr, a.weight_decay, a.alpha, a.eps, a.momentum);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CPU, m) { m.impl("rmsprop_", Flat<RMSpropCall, rmsprop_cpu>::call); }

}  // namespace nnfast
