// The update of Adam and AdamW over a range of one tensor's elements. The maths is in math/adamw.h.
//
// Bound by memory: read p, g, m, v and write p, m, v, which is 28 bytes an element in float.
#pragma once

#include "../math/adamw.h"
#include "optimizer.h"

namespace nnfast::NNFAST_ISA {

// T: of the parameter and its gradient; S: of the moments.
template <class T, class S, bool AmsGrad, bool Exact>
void adamw_kernel(const AdamWTensor& t, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  T* g = (T*)t.grad + begin;
  S *m = (S*)t.state[0] + begin, *v = (S*)t.state[1] + begin, *top = AmsGrad ? (S*)t.state[2] + begin : nullptr;
  const AdamWStep<A> scalars(t.scalars);
  const bool l2 = t.scalars.l2 != 0;
  sweep<A>(end - begin, [&](int64_t i, auto part) NNFAST_LAMBDA {
    using V = typename decltype(part)::vec;
    const AdamWStep<V> step(scalars);
    V grad = read_grad(t, g + i, part);
    const V param = read_param<Exact, T>(t, begin + i, part);
    if (l2) grad = grad + param * step.l2;
    V exp_avg = load(m + i, part), exp_avg_sq = load(v + i, part);
    adamw_moments(grad, exp_avg, exp_avg_sq, step);
    store(m + i, exp_avg, part);
    // Where v falls by less than half a unit a step, rounding to nearest would leave it for ever.
    bool stored = false;
    if constexpr (std::is_same_v<S, bf16>)
      if ((stored = t.stochastic)) store_stochastic(v + i, exp_avg_sq, ~t.seed, (uint32_t)(begin + i), part);
    if (!stored) store(v + i, exp_avg_sq, part);
    if constexpr (AmsGrad) {
      exp_avg_sq = maximum(load(top + i, part), exp_avg_sq);
      store(top + i, exp_avg_sq, part);
    }
    write_param<Exact, T>(t, begin + i, adamw_param(param, exp_avg, exp_avg_sq, step), part);
  });
}

template <class T, class S>
NNFAST_INLINE void adamw_of(const AdamWTensor& t, int64_t begin, int64_t end) {
  if constexpr (std::is_same_v<T, bf16>)
    if (t.master) return (t.state[2] ? adamw_kernel<T, S, true, true> : adamw_kernel<T, S, false, true>)(t, begin, end);
  (t.state[2] ? adamw_kernel<T, S, true, false> : adamw_kernel<T, S, false, false>)(t, begin, end);
}

NNFAST_INLINE void adamw(const AdamWTensor& t, int64_t begin, int64_t end) {
  visit(t.dtype, t.state_dtype, [&](auto e, auto s) { adamw_of<decltype(e), decltype(s)>(t, begin, end); });
}

}  // namespace nnfast::NNFAST_ISA
