// GELU and its derivative, for one value: a float or double, on a CPU or in a CUDA thread, or a SIMD register.
//
//   none:  gelu(x) = x P(x),  P(x) = (1 + erf(x / sqrt 2)) / 2,  gelu'(x) = P(x) + x p(x),
//          p(x) = exp(-x^2 / 2) / sqrt(2 pi)
//   tanh:  gelu(x) = x S(v),  S(v) = 1 / (1 + exp(-v)) = (1 + tanh(v / 2)) / 2,
//          v = 2 sqrt(2 / pi) (x + 0.044715 x^3),  gelu'(x) = S(v) + x S(v) (1 - S(v)) v'
//
// Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; the two are torch's approximate="none" and
// "tanh". A is the scalar type of V: the constants are rounded to it once.
#pragma once

#include <cmath>

#include "fn.h"

namespace nnfast {

// A probability P(x) and 1 - P(x), neither taken from the other by a subtraction that would lose its digits.
template <class V>
struct Sides {
  V lower, upper;
};

// For float and double; a SIMD register brings its own, with the same names.
template <class A>
NNFAST_FN Sides<A> normal_cdf(A x) {
  using std::erfc;
  return {A(0.5) * erfc(-x * A(0.70710678118654752440)), A(0.5) * erfc(x * A(0.70710678118654752440))};
}
template <class A>
NNFAST_FN Sides<A> sigmoid(A x) {
  using std::exp;
  return {A(1) / (A(1) + exp(-x)), A(1) / (A(1) + exp(x))};
}

template <bool Tanh, class A, class V>
NNFAST_FN V gelu(V x) {
  if constexpr (Tanh) return x * sigmoid(x * (A(1.5957691216057308) + x * x * A(0.07135481627260025))).lower;
  return x * normal_cdf(x).lower;
}

template <bool Tanh, class A, class V>
NNFAST_FN V gelu_grad(V x) {
  using std::exp;
  if constexpr (Tanh) {
    const V square = x * x;
    const Sides<V> s = sigmoid(x * (A(1.5957691216057308) + square * A(0.07135481627260025)));
    return s.lower + x * (s.lower * s.upper) * (A(1.5957691216057308) + square * A(3 * 0.07135481627260025));
  }
  return normal_cdf(x).lower + x * (A(0.3989422804014327) * exp(x * x * A(-0.5)));
}

}  // namespace nnfast
