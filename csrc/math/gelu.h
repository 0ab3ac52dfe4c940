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

// log2(erfc(a / sqrt 2)), for a float 0 <= a <= 15.5: a times the minimax polynomial of log2(erfc(a / sqrt 2)) / a.
// 1 - P(a) = 2^(log2_erfc(a) - 1), to 2.2e-8 absolute, which is 0 in float from a = 14.2 on.
template <class V>
NNFAST_FN V log2_erfc(V a) {
  V p = a * 5.281241399757164e-08f - 2.0457730443013133e-06f;
  p = p * a + 2.7296080588712357e-05f;
  p = p * a - 0.00013086646504234523f;
  p = p * a - 0.0002569342905189842f;
  p = p * a + 0.007198233623057604f;
  p = p * a - 0.05257304012775421f;
  p = p * a - 0.45918846130371094f;
  p = p * a - 1.151106834411621f;
  return p * a;
}

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

#ifdef __CUDACC__
// A float on a GPU, as a SIMD register has it: both sides from the one below a half, two instructions of the
// special-function unit in all. The bound is no fminf, which would give the bound for a NaN.
NNFAST_FN Sides<float> sides(float x, float small) {
  return x < 0 ? Sides<float>{small, 1 - small} : Sides<float>{1 - small, small};
}
template <>
NNFAST_FN Sides<float> normal_cdf(float x) {
  const float a = fabsf(x) > 14.2f ? 14.2f : fabsf(x);
  return sides(x, exp2f(log2_erfc(a) - 1));
}
template <>
NNFAST_FN Sides<float> sigmoid(float x) {
  const float z = exp2f(fabsf(x) * -1.44269504f);
#ifdef __CUDA_ARCH__
  return sides(x, __fdividef(z, 1 + z));  // 1 <= 1 + z <= 2: two units in the last place
#else
  return sides(x, z / (1 + z));
#endif
}
#endif

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
  return x * (A(0.3989422804014327) * exp(x * x * A(-0.5))) + normal_cdf(x).lower;
}

}  // namespace nnfast
