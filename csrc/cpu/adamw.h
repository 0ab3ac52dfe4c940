// The AdamW update over a range of one tensor's elements. The maths is in math/adamw.h.
//
// Bound by memory: read p, g, m, v and write p, m, v, which is 28 bytes an element in float.
#pragma once

#include "../math/adamw.h"
#include "simd.h"

namespace nnfast::NNFAST_ISA {

template <class T, bool AmsGrad>
void adamw_kernel(const AdamWTensor& t, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  T *p = (T*)t.param + begin, *g = (T*)t.grad + begin, *m = (T*)t.exp_avg + begin, *v = (T*)t.exp_avg_sq + begin;
  T* top = AmsGrad ? (T*)t.max_exp_avg_sq + begin : nullptr;
  const AdamWStep<A> scalars(t.step);
  const bool unscale = t.grad_scale != 1;
  sweep<A>(end - begin, [&](int64_t i, auto part) NNFAST_LAMBDA {
    using V = typename decltype(part)::vec;
    const AdamWStep<V> step(scalars);
    V grad = load(g + i, part);
    if (unscale) {
      grad = grad / V(t.grad_scale);
      store(g + i, grad, part);
    }
    if (t.maximize) grad = -grad;
    V exp_avg = load(m + i, part), exp_avg_sq = load(v + i, part);
    adamw_moments(grad, exp_avg, exp_avg_sq, step);
    store(m + i, exp_avg, part);
    store(v + i, exp_avg_sq, part);
    if constexpr (AmsGrad) {
      exp_avg_sq = maximum(load(top + i, part), exp_avg_sq);
      store(top + i, exp_avg_sq, part);
    }
    store(p + i, adamw_param(load(p + i, part), exp_avg, exp_avg_sq, step), part);
  });
}

NNFAST_INLINE void adamw(const AdamWTensor& t, int64_t begin, int64_t end) {
  visit(t.dtype, [&](auto e) {
    (t.max_exp_avg_sq ? adamw_kernel<decltype(e), true> : adamw_kernel<decltype(e), false>)(t, begin, end);
  });
}

}  // namespace nnfast::NNFAST_ISA
