// Adam and AdamW on a CPU.
#include <torch/library.h>

#include <cmath>

#include "step.h"

namespace nnfast {
namespace {

Path served("adamw_"), exact("adamw_.master"), by_chance("adamw_.stochastic");

void adamw_cpu(const AdamWCall& a) {
  if (!a.state[AdamWCall::kMaster].empty()) exact.taken();
  if (a.rounding_seed) by_chance.taken();
  step_cpu(a, &Kernels::adamw, served, [&](double lr, double t) {
    return AdamWStep<double>(
        lr, a.beta1, a.beta2, a.eps, a.weight_decay, std::pow(a.beta1, t), std::pow(a.beta2, t),
        a.decoupled_weight_decay);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CPU, m) { m.impl("adamw_", Flat<AdamWCall, adamw_cpu>::call); }

}  // namespace nnfast
