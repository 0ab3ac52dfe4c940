// Matrix products on a CPU, by whichever library is faster for them here.
#pragma once

#include "../ops/op.h"

namespace nnfast {

// input weight^T + bias, for matrices (M, K) and (N, K) of one dtype and any strides.
Tensor product(const Tensor& input, const Tensor& weight, const OptTensor& bias = std::nullopt);

// The same without a bias, widened to float where that is asked of 16-bit ones.
Tensor product_as(at::ScalarType dtype, const Tensor& input, const Tensor& weight);

// What product and product_as do, by our own kernel: a b^T + bias, in float or in the dtype of both.
Tensor gemm(at::ScalarType dtype, const Tensor& a, const Tensor& b, const OptTensor& bias = std::nullopt);

}  // namespace nnfast
