// One SGD step for one element, in torch's order, g = -grad when maximizing:
//
//   g = g + weight_decay p
//   b = momentum b + (1 - dampening) g, and g = b, or g + momentum b under Nesterov
//   p = p - lr g
//
// Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013, as torch.optim
// documents where it differs.
#pragma once

#include "fn.h"

namespace nnfast {

// A is double for the caller who forms it, then the register or scalar type of the elements.
template <class A>
struct SgdStep {
  A lr, l2, momentum, one_minus_dampening;
  bool nesterov;

  SgdStep() = default;
  SgdStep(A lr, A l2, A momentum, A dampening, bool nesterov)
      : lr(lr), l2(l2), momentum(momentum), one_minus_dampening(A(1) - dampening), nesterov(nesterov) {}
  template <class B>
  NNFAST_FN explicit SgdStep(const SgdStep<B>& s)
      : lr(s.lr), l2(s.l2), momentum(s.momentum), one_minus_dampening(s.one_minus_dampening), nesterov(s.nesterov) {}
};

// The gradient that the parameter takes, and the buffer it leaves.
template <class V>
NNFAST_FN V sgd_momentum(V grad, V& buffer, const SgdStep<V>& s) {
  buffer = buffer * s.momentum + grad * s.one_minus_dampening;
  return s.nesterov ? grad + buffer * s.momentum : buffer;
}

template <class V>
NNFAST_FN V sgd_param(V param, V grad, const SgdStep<V>& s) {
  return param - s.lr * grad;
}

}  // namespace nnfast
