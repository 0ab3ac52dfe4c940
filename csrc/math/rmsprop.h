// One RMSprop step for one element, in torch's order, g = -grad when maximizing:
//
//   g = g + weight_decay p
//   v = alpha v + (1 - alpha) g^2
//   a = a + (g - a) (1 - alpha), and v - a^2 in place of v below, where it is centered
//   u = g / (sqrt(v) + eps)
//   b = momentum b + u, and b in place of u below, with momentum
//   p = p - lr u
//
// Source: Hinton, lecture 6e of "Neural Networks for Machine Learning", 2012; centered: Graves, "Generating Sequences
// With Recurrent Neural Networks", 2013.
#pragma once

#include <cmath>

#include "fn.h"

namespace nnfast {

// A is double for the caller who forms it, then the register or scalar type of the elements.
template <class A>
struct RMSpropStep {
  A lr, l2, alpha, one_minus_alpha, eps, momentum;

  RMSpropStep() = default;
  RMSpropStep(A lr, A l2, A alpha, A eps, A momentum)
      : lr(lr), l2(l2), alpha(alpha), one_minus_alpha(A(1) - alpha), eps(eps), momentum(momentum) {}
  template <class B>
  NNFAST_FN explicit RMSpropStep(const RMSpropStep<B>& s)
      : lr(s.lr), l2(s.l2), alpha(s.alpha), one_minus_alpha(s.one_minus_alpha), eps(s.eps), momentum(s.momentum) {}
};

template <class V>
NNFAST_FN V rmsprop_square_avg(V grad, V square_avg, const RMSpropStep<V>& s) {
  return square_avg * s.alpha + grad * s.one_minus_alpha * grad;  // g^2 alone overflows sooner
}

template <class V>
NNFAST_FN V rmsprop_grad_avg(V grad, V grad_avg, const RMSpropStep<V>& s) {
  return grad_avg + (grad - grad_avg) * s.one_minus_alpha;
}

// variance: of the gradient where it is centered, its mean square where not.
template <class V>
NNFAST_FN V rmsprop_update(V grad, V variance, const RMSpropStep<V>& s) {
  using std::sqrt;
  return grad / (sqrt(variance) + s.eps);
}

}  // namespace nnfast
