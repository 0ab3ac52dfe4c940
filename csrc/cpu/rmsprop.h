// The update of RMSprop over a range of one tensor's elements. The maths is in math/rmsprop.h.
//
// Bound by memory: read p, g, v and write p, v, which is 20 bytes an element in float; 8 more with momentum, and 8 more
// where the gradient is centered.
#pragma once

#include "../math/rmsprop.h"
#include "optimizer.h"

namespace nnfast::NNFAST_ISA {

template <class T, class S, bool Momentum, bool Centered>
void rmsprop_kernel(const RMSpropTensor& t, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  T* g = (T*)t.grad + begin;
  S *v = (S*)t.state[0] + begin, *b = Momentum ? (S*)t.state[1] + begin : nullptr;
  S* a = Centered ? (S*)t.state[2] + begin : nullptr;
  const RMSpropStep<A> scalars(t.scalars);
  const bool l2 = t.scalars.l2 != 0;
  sweep<A>(end - begin, [&](int64_t i, auto part) NNFAST_LAMBDA {
    using V = typename decltype(part)::vec;
    const RMSpropStep<V> step(scalars);
    V grad = read_grad(t, g + i, part);
    const V param = read_param<false, T>(t, begin + i, part);
    if (l2) grad = grad + param * step.l2;
    V variance = rmsprop_square_avg(grad, load(v + i, part), step);
    store(v + i, variance, part);
    if constexpr (Centered) {
      const V mean = rmsprop_grad_avg(grad, load(a + i, part), step);
      store(a + i, mean, part);
      variance = variance - mean * mean;
    }
    V update = rmsprop_update(grad, variance, step);
    if constexpr (Momentum) {
      update = load(b + i, part) * step.momentum + update;
      store(b + i, update, part);
    }
    write_param<false, T>(t, begin + i, param - step.lr * update, part);
  });
}

NNFAST_INLINE void rmsprop(const RMSpropTensor& t, int64_t begin, int64_t end) {
  visit(t.dtype, t.state_dtype, [&](auto e, auto s) {
    using T = decltype(e);
    using S = decltype(s);
    const auto kernel = t.state[1]
                            ? (t.state[2] ? rmsprop_kernel<T, S, true, true> : rmsprop_kernel<T, S, true, false>)
                            : (t.state[2] ? rmsprop_kernel<T, S, false, true> : rmsprop_kernel<T, S, false, false>);
    kernel(t, begin, end);
  });
}

}  // namespace nnfast::NNFAST_ISA
