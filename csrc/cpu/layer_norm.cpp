// LayerNorm on a CPU: memory, threads, and the sums over rows. The arithmetic is in layer_norm.h.
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../ops/op.h"
#include "../ops/paths.h"
#include "cpu.h"
#include "memory.h"

namespace nnfast {
namespace {

Path forward("layer_norm"), backward("layer_norm_backward");

DType affine_dtype(const Tensor& input, const OptTensor& weight, const OptTensor& bias) {
  return cpu_dtype(defined(weight) ? *weight : defined(bias) ? *bias : input);
}

std::tuple<Tensor, Tensor> layer_norm_cpu(
    const Tensor& input, at::IntArrayRef normalized_shape, const OptTensor& weight_, const OptTensor& bias_, double eps,
    std::optional<at::ScalarType> dtype) {
  const auto [rows, size] = check_layer_norm(input, normalized_shape, weight_, bias_, dtype, cpu_kernels());
  // Nothing on a CPU asks for this: autocast there leaves layer_norm alone.
  if (dtype.value_or(input.scalar_type()) != input.scalar_type())
    return layer_norm_cpu(input.to(*dtype), normalized_shape, weight_, bias_, eps, dtype);
  forward.taken();
  const OptTensor weight = contiguous(weight_), bias = contiguous(bias_);
  const Rows x = rows_of(input, size, normalized_shape.size());
  Tensor output = empty(input.sizes(), input.scalar_type());
  Tensor stats = empty({2, rows}, at::toOpMathType(input.scalar_type()));
  const LayerNormForward f{
      .dtype = cpu_dtype(input),
      .weight_dtype = affine_dtype(input, weight, bias),
      .size = size,
      .input_stride = x.stride,
      .eps = eps,
      .input = x.tensor.const_data_ptr(),
      .weight = data(weight),
      .bias = data(bias),
      .output = output.mutable_data_ptr(),
      .mean = stats.mutable_data_ptr(),
      .rstd = (char*)stats.mutable_data_ptr() + rows * stats.element_size(),
      .stream = may_stream(output, output.nbytes() + input.nbytes())};
  at::parallel_for(
      0, rows, row_grain(size), [&](int64_t begin, int64_t end) { cpu_kernels()->layer_norm(f, begin, end); });
  return {output, stats};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(
    const Tensor& grad_out, const Tensor& input, at::IntArrayRef normalized_shape, const Tensor& stats_,
    const OptTensor& weight_, const OptTensor& bias, std::array<bool, 3> output_mask) {
  const auto wide = float_beside(input, grad_out);
  const auto [rows, size] = check_layer_norm(input, normalized_shape, weight_, bias, wide, cpu_kernels());
  check_layer_norm_backward(grad_out, input, c10::fromIntArrayRefSlow(normalized_shape), stats_);
  if (wide) {
    auto grads =
        layer_norm_backward_cpu(grad_out, input.to(*wide), normalized_shape, stats_, weight_, bias, output_mask);
    if (output_mask[0]) std::get<0>(grads) = std::get<0>(grads).to(input.scalar_type());
    return grads;
  }
  backward.taken();
  const OptTensor weight = contiguous(weight_);
  const Tensor stats = stats_.contiguous();
  const Rows g = rows_of(grad_out, size, normalized_shape.size()), x = rows_of(input, size, normalized_shape.size());
  Tensor grad_input = output_mask[0] ? empty(input.sizes(), input.scalar_type()) : Tensor();
  const LayerNormBackward b{
      .dtype = cpu_dtype(input),
      .weight_dtype = affine_dtype(input, weight, bias),
      .size = size,
      .grad_out_stride = g.stride,
      .input_stride = x.stride,
      .grad_out = g.tensor.const_data_ptr(),
      .input = x.tensor.const_data_ptr(),
      .weight = data(weight),
      .mean = stats.const_data_ptr(),
      .rstd = (const char*)stats.const_data_ptr() + rows * stats.element_size(),
      .grad_input = output_mask[0] ? grad_input.mutable_data_ptr() : nullptr,
      .stream = output_mask[0] && may_stream(grad_input, 3 * input.nbytes())};
  const int64_t threads = row_threads(rows, size);
  RowSums grad_weight(output_mask[1] && weight, threads, size, input);
  RowSums grad_bias(output_mask[2] && defined(bias), threads, size, input);
  for_each_block(rows, size, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    cpu_kernels()->layer_norm_backward(b, grad_weight.of(thread), grad_bias.of(thread), begin, end);
    grad_weight.end_block(thread);
    grad_bias.end_block(thread);
  });
  const auto affine = (weight ? *weight : defined(bias) ? *bias : input).scalar_type();
  return {grad_input, grad_weight.total(normalized_shape, affine), grad_bias.total(normalized_shape, affine)};
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CPU, m) {
  m.impl("layer_norm", layer_norm_cpu);
  m.impl("layer_norm_backward", layer_norm_backward_cpu);
}

}  // namespace nnfast
