// Cross-entropy of a row x of C logits with its class y, as its pieces see one value: a scalar or a SIMD register.
//
//   n_c = log(sum_k exp x_k) - x_c = log(sum) + (max - x_c),   max = max_k x_k,   sum = sum_k exp(x_k - max)
//   loss = (1 - e) w_y n_y + e / C sum_c w_c n_c
//
// w are the classes' weights, e the label smoothing. For the gradient g of the loss, with a = (1 - e) w_y g and
// b = e / C g,
//
//   dx_c = (a + b sum_k w_k) / sum exp(x_c - max) - b w_c - a [c = y]
//
// Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, for the smoothing. max and
// sum are kept apart: the one number log(sum) + max loses the digits of small losses where logits are large.
#pragma once

#include <cmath>

#include "fn.h"

namespace nnfast {

// n_c.
template <class A>
NNFAST_FN A negative_log_softmax(A x, A max, A log_sum) {
  return log_sum + (max - x);
}

// A sum over exp(x - from) as one over exp(x - to), from <= to. Where there was nothing yet, from is -inf and sum 0.
template <class A>
NNFAST_FN A rebased(A sum, A from, A to) {
  using std::exp;
  return from == to || sum == A(0) ? sum : sum * exp(from - to);
}

// loss, from n_y and sum_c w_c n_c.
template <class A>
NNFAST_FN A cross_entropy(A n_y, A w_y, A sum_of_n, A smoothing, A classes) {
  const A loss = (A(1) - smoothing) * (w_y * n_y);
  return smoothing == A(0) ? loss : loss + smoothing / classes * sum_of_n;
}

// a, b, and (a + b sum_k w_k) / sum.
template <class A>
struct CrossEntropyScales {
  A a, b, softmax;
};
template <class A>
NNFAST_FN CrossEntropyScales<A> cross_entropy_scales(A grad, A w_y, A all_weights, A classes, A smoothing, A sum) {
  const A a = (A(1) - smoothing) * w_y * grad, b = smoothing == A(0) ? A(0) : smoothing / classes * grad;
  return {a, b, (smoothing == A(0) ? a : a + b * all_weights) / sum};
}

}  // namespace nnfast
