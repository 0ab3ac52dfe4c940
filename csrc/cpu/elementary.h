// Elementary functions of registers, as math/gelu.h names them. V is any number of registers, of floats where nothing
// else is said.
#pragma once

#include "../math/gelu.h"
#include "simd.h"

namespace nnfast::NNFAST_ISA {

// Scalar math: 2^(n + f) = 2^n (1 + f p(f)), p the minimax polynomial of (2^f - 1) / f over |f| <= 1/2: 9.1e-8 relative
// to 2^f. For a whole number n.
template <class V>
NNFAST_INLINE V exp2_of(V n, V f) {
  V p = f * 1.326472731307149e-03f + 9.671512991189957e-03f;
  p = p * f + 5.550733581185341e-02f;
  p = p * f + 2.4022242426872253e-01f;
  p = p * f + 6.931470036506653e-01f;
  return scale2(p * f + 1.0f, n);
}

// 2^(x + shift): n = round(x), f = x - n. For finite x up to 127, and a whole number as shift.
template <class V>
NNFAST_INLINE V exp2(V x, float shift) {
  const V n = round(x);
  return exp2_of(n + shift, x - n);
}

// e^x for x <= 0. x is held at -200, -infinity too: e^x is 0 there already. A NaN is let through.
template <class V>
NNFAST_INLINE V exp_of_negative(V x) {
  return exp2(at_least(V(-200.0f), x) * 1.44269504f, 0.0f);
}

// Both sides of a probability from the one below a half, which is the lower one where x is negative.
template <class V>
NNFAST_INLINE Sides<V> sides(V x, V small) {
  const V large = V(1.0f) - small;
  return {blend_negative(x, small, large), blend_negative(x, large, small)};
}

// Scalar math: z = e^-|x|, small = z / (1 + z).
template <class V>
NNFAST_INLINE Sides<V> sigmoid_simd(V x) {
  const V z = exp_of_negative(-abs(x));
  return sides(x, z / (z + 1.0f));
}

// Scalar math: small = erfc(a / sqrt 2) / 2 = 2^(log2_erfc(a) - 1), a = |x|.
template <class V>
NNFAST_INLINE Sides<V> normal_cdf_simd(V x) {
  const V a = at_most(V(14.2f), abs(x));
  return sides(x, exp2(log2_erfc(a), -1.0f));
}

// e^x for a double x <= 0, to the last bits but one. Scalar math: n = round(x / log 2), r = x - n log 2 in two parts,
// e^x = 2^n e^r, e^r by its Taylor series to r^13: the next term is 4e-18 of it.
template <class V>
NNFAST_INLINE V exp_of_negative_double(V x) {
  x = at_least(V(-2000.0), x);
  const V n = round(x * 1.4426950408889634), r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  V p = r * (1.0 / 6227020800) + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  return scale2(p * r + 1.0, n);
}

NNFAST_INLINE f64v exp(f64v x) { return exp_of_negative_double(x); }
NNFAST_INLINE Quad<double> exp(Quad<double> x) { return exp_of_negative_double(x); }
NNFAST_INLINE f32v exp(f32v x) { return exp_of_negative(x); }
NNFAST_INLINE Quad<float> exp(Quad<float> x) { return exp_of_negative(x); }
NNFAST_INLINE Sides<f32v> sigmoid(f32v x) { return sigmoid_simd(x); }
NNFAST_INLINE Sides<Quad<float>> sigmoid(Quad<float> x) { return sigmoid_simd(x); }
NNFAST_INLINE Sides<f32v> normal_cdf(f32v x) { return normal_cdf_simd(x); }
NNFAST_INLINE Sides<Quad<float>> normal_cdf(Quad<float> x) { return normal_cdf_simd(x); }

}  // namespace nnfast::NNFAST_ISA
