// The update of SGD over a range of one tensor's elements. The maths is in math/sgd.h.
//
// Bound by memory: read p, g, b and write p, b, which is 20 bytes an element in float; 12 without momentum.
#pragma once

#include "../math/sgd.h"
#include "optimizer.h"

namespace nnfast::NNFAST_ISA {

template <class T, class S, bool Momentum>
void sgd_kernel(const SgdTensor& t, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  T* g = (T*)t.grad + begin;
  S* b = Momentum ? (S*)t.state[0] + begin : nullptr;
  const SgdStep<A> scalars(t.scalars);
  const bool l2 = t.scalars.l2 != 0;
  sweep<A>(end - begin, [&](int64_t i, auto part) NNFAST_LAMBDA {
    using V = typename decltype(part)::vec;
    const SgdStep<V> step(scalars);
    V grad = read_grad(t, g + i, part);
    const V param = read_param<false, T>(t, begin + i, part);
    if (l2) grad = grad + param * step.l2;
    if constexpr (Momentum) {
      V buffer = load(b + i, part);
      grad = sgd_momentum(grad, buffer, step);
      store(b + i, buffer, part);
    }
    write_param<false, T>(t, begin + i, sgd_param(param, grad, step), part);
  });
}

NNFAST_INLINE void sgd(const SgdTensor& t, int64_t begin, int64_t end) {
  visit(t.dtype, t.state_dtype, [&](auto e, auto s) {
    using T = decltype(e);
    using S = decltype(s);
    (t.state[0] ? sgd_kernel<T, S, true> : sgd_kernel<T, S, false>)(t, begin, end);
  });
}

}  // namespace nnfast::NNFAST_ISA
