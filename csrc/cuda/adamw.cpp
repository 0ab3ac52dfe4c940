// Adam and AdamW on a CUDA device.
#include <torch/library.h>

#include "optimizer.h"

namespace nnfast::cuda {
namespace {

void adamw_cuda(const AdamWCall& c) {
  step_cuda<AdamW>(c, adamw, [&](double lr, double t) {
    return AdamW{
        c.beta1,
        c.beta2,
        c.weight_decay,
        c.eps,
        std::log(c.beta1),
        std::log(c.beta2),
        c.decoupled_weight_decay,
        {lr, c.beta1, c.beta2, c.eps, c.weight_decay, std::pow(c.beta1, t), std::pow(c.beta2, t),
         c.decoupled_weight_decay}};
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CUDA, m) { m.impl("adamw_", Flat<AdamWCall, adamw_cuda>::call); }

}  // namespace nnfast::cuda
