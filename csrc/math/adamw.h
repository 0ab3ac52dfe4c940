// One AdamW step for one element: a scalar, a SIMD register, a CUDA thread. In torch's order:
//
//   p = p (1 - lr weight_decay)
//   m = m + (g - m) (1 - beta1)
//   v = v beta2 + g^2 (1 - beta2)
//   p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// with g = -grad when maximizing, and under amsgrad the largest v so far in place of v in the last line. Adam, whose
// decay is not decoupled, has g = g + weight_decay p in place of the first line.
// Source: Kingma and Ba, "Adam", 2015; Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019; Reddi et
// al., "On the Convergence of Adam and Beyond", 2018. The scalars are formed in double, once a tensor. sqrt(1 -
// beta2^t) is taken out of the denominator there, which saves a division and a rounding an element.
#pragma once

#include <cmath>

#include "fn.h"

namespace nnfast {

// A is double for the caller who forms it, then the register or scalar type of the elements.
template <class A>
struct AdamWStep {
  A decay, l2, one_minus_beta1, beta2, one_minus_beta2, step_size, eps;

  AdamWStep() = default;

  template <class B>
  NNFAST_FN explicit AdamWStep(const AdamWStep<B>& s)
      : decay(s.decay),
        l2(s.l2),
        one_minus_beta1(s.one_minus_beta1),
        beta2(s.beta2),
        one_minus_beta2(s.one_minus_beta2),
        step_size(s.step_size),
        eps(s.eps) {}

  // power1, power2: the betas to the power of t, the number of the step.
  NNFAST_FN AdamWStep(A lr, A beta1, A beta2, A eps, A weight_decay, A power1, A power2, bool decoupled = true)
      : decay(decoupled && weight_decay != A(0) ? A(1) - lr * weight_decay : A(1)),
        l2(decoupled ? A(0) : weight_decay),
        one_minus_beta1(A(1) - beta1),
        beta2(beta2),
        one_minus_beta2(A(1) - beta2) {
    using std::sqrt;
    const A correction2 = sqrt(A(1) - power2);
    step_size = lr / (A(1) - power1) * correction2;
    this->eps = eps * correction2;
  }
};

template <class V>
NNFAST_FN void adamw_moments(V grad, V& exp_avg, V& exp_avg_sq, const AdamWStep<V>& s) {
  exp_avg = exp_avg + (grad - exp_avg) * s.one_minus_beta1;
  exp_avg_sq = exp_avg_sq * s.beta2 + grad * s.one_minus_beta2 * grad;  // g^2 alone overflows sooner
}

template <class V>
NNFAST_FN V adamw_param(V param, V exp_avg, V exp_avg_sq, const AdamWStep<V>& s) {
  using std::sqrt;
  return param * s.decay - s.step_size * exp_avg / (sqrt(exp_avg_sq) + s.eps);
}

}  // namespace nnfast
