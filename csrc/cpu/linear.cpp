// Linear on a CPU: which products it takes, and the sum for its bias.
#include <torch/library.h>

#include "../ops/op.h"
#include "../ops/paths.h"
#include "cpu.h"
#include "product.h"

namespace nnfast {
namespace {

Path served("linear"), backward_served("linear_backward");

Tensor linear_cpu(const Tensor& input, const Tensor& weight, const OptTensor& bias) {
  check_covered(cpu_kernels() && covers_linear(input, weight, bias), "linear");
  served.taken();
  if (input.dim() == 2) return product(input, weight, bias);
  at::DimVector sizes(input.sizes());
  sizes.back() = weight.size(0);
  return product(input.reshape({-1, weight.size(1)}), weight, bias).view(sizes);
}

Tensor sum_over_rows(const Tensor& rows, at::ScalarType dtype) {
  const int64_t count = rows.size(0), size = rows.size(1), threads = row_threads(count, size);
  const Rows from = rows_of(rows, size, 1);
  RowSums sums(true, threads, size, rows);
  for_each_block(count, size, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    cpu_kernels()->sum_rows(
        cpu_dtype(rows), from.tensor.const_data_ptr(), from.stride, size, sums.of(thread), begin, end);
    sums.end_block(thread);
  });
  return sums.total({size}, dtype);
}

std::tuple<Tensor, Tensor, Tensor> linear_backward_cpu(
    const Tensor& grad_out, const OptTensor& input, const OptTensor& weight, std::array<bool, 3> output_mask,
    std::optional<at::ScalarType> dtype, std::optional<at::ScalarType> input_dtype) {
  check_linear_backward(grad_out, input, weight, output_mask, dtype, input_dtype);
  check_covered(cpu_kernels(), "linear_backward");
  backward_served.taken();
  const Tensor grad = grad_out.reshape({-1, grad_out.size(-1)});
  const auto type = dtype.value_or(grad.scalar_type());
  Tensor grad_input, grad_weight, grad_bias;
  if (output_mask[0]) {
    at::DimVector sizes(grad_out.sizes());
    sizes.back() = weight->size(1);
    grad_input = product_as(input_dtype.value_or(grad.scalar_type()), grad, weight->t()).view(sizes);
  }
  if (output_mask[1]) {
    const Tensor x = input->reshape({-1, input->size(-1)});
    grad_weight = by_columns(weight) ? product_as(type, x.t(), grad.t()).t() : product_as(type, grad.t(), x.t());
  }
  if (output_mask[2]) grad_bias = sum_over_rows(grad, type);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CPU, m) {
  m.impl("linear", linear_cpu);
  m.impl("linear_backward", linear_backward_cpu);
}

}  // namespace nnfast
