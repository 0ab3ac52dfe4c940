// LayerNorm for one row x of N values, as its pieces see one value: a scalar, a SIMD register, a CUDA thread.
//
//   mean = sum(x) / N,  var = sum((x - mean)^2) / N,  rstd = 1 / sqrt(var + eps)
//   y = xhat w + b,  xhat = (x - mean) rstd
//
// and, for the gradient g of y,
//
//   dw = sum over rows of g xhat,  db = sum over rows of g
//   dx = rstd (g w - mean(g w) - xhat mean(g w xhat))
//
// Source: Ba, Kiros and Hinton, "Layer Normalization", 2016. The variance is taken in two passes, centred: in one
// pass, E[x^2] - E[x]^2 loses every digit when the mean is large.
#pragma once

#include <cmath>

#include "fn.h"

namespace nnfast {

// A rounded mean leaves a small mean of x - mean behind; taking its square out again makes the variance exact to the
// last bits (Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983).
template <class A>
NNFAST_FN A corrected_variance(A mean_of_squares, A residual_mean) {
  return mean_of_squares - residual_mean * residual_mean;
}

// A variance that rounding made negative counts as 0; NaN stays NaN.
template <class A>
NNFAST_FN A reciprocal_std(A variance, A eps) {
#ifdef __CUDA_ARCH__
  return rsqrtf((variance < A(0) ? A(0) : variance) + eps);
#else
  using std::sqrt;
  return A(1) / sqrt((variance < A(0) ? A(0) : variance) + eps);
#endif
}

template <class V>
NNFAST_FN V normalized(V x, V mean, V rstd) {
  return (x - mean) * rstd;
}

template <class V>
NNFAST_FN V layer_norm_grad_input(V grad_xhat, V xhat, V mean_grad_xhat, V mean_grad_xhat_xhat, V rstd) {
  return (grad_xhat - mean_grad_xhat - xhat * mean_grad_xhat_xhat) * rstd;
}

}  // namespace nnfast
