// LayerNorm on a CUDA device: memory and the way to the kernels of layer_norm.cu.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <atomic>

#include "../ops/op.h"
#include "../ops/rows.h"
#include "cuda.h"

namespace nnfast::cuda {
namespace {

void* data_of(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

// weight and bias have the dtype of the output: the input's, or float.
void check_beside(const OptTensor& weight, const OptTensor& bias, at::ScalarType output) {
  for (const auto* t : {&weight, &bias})
    TORCH_CHECK_NOT_IMPLEMENTED(
        !defined(*t) || (*t)->scalar_type() == output,
        "nnfast::layer_norm: a weight in float beside 16 bits wants an output in float on a GPU");
}

std::tuple<Tensor, Tensor> layer_norm_cuda(
    const Tensor& input, at::IntArrayRef normalized_shape, const OptTensor& weight_, const OptTensor& bias_, double eps,
    std::optional<at::ScalarType> dtype) {
  const auto [rows, size] = check_layer_norm(input, normalized_shape, weight_, bias_, dtype);
  check_beside(weight_, bias_, dtype.value_or(input.scalar_type()));
  const On on(input);
  const OptTensor weight = contiguous(weight_), bias = contiguous(bias_);
  const Rows x = rows_of(input, size, normalized_shape.size());
  Tensor output = at::empty(input.sizes(), input.options().dtype(dtype.value_or(input.scalar_type())));
  Tensor stats = at::empty({2, rows}, input.options().dtype(at::kFloat));
  C10_CUDA_CHECK(
      cuda::layer_norm(
          {dtype_of(input), dtype_of(output), rows, size, x.stride, eps, x.tensor.const_data_ptr(), data(weight),
           data(bias), output.mutable_data_ptr(), stats.mutable_data_ptr<float>(),
           stats.mutable_data_ptr<float>() + rows},
          on.stream));
  return {output, stats};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cuda(
    const Tensor& grad_out, const Tensor& input, at::IntArrayRef normalized_shape, const Tensor& stats_,
    const OptTensor& weight_, const OptTensor& bias, std::array<bool, 3> output_mask) {
  const auto [rows, size] = check_layer_norm(input, normalized_shape, weight_, bias, float_beside(input, grad_out));
  check_layer_norm_backward(grad_out, input, c10::fromIntArrayRefSlow(normalized_shape), stats_);
  check_beside(weight_, bias, grad_out.scalar_type());
  const On on(input);
  const OptTensor weight = contiguous(weight_);
  const Tensor stats = stats_.contiguous();
  const Rows g = rows_of(grad_out, size, normalized_shape.size()), x = rows_of(input, size, normalized_shape.size());
  const auto grad_of = [&](const OptTensor& t, bool wanted) {
    return wanted && defined(t) ? at::empty(normalized_shape, t->options()) : Tensor();
  };
  Tensor grad_input = output_mask[0] ? at::empty(input.sizes(), input.options()) : Tensor();
  Tensor grad_weight = grad_of(weight, output_mask[1]), grad_bias = grad_of(bias, output_mask[2]);
  const LayerNormBackward b{
      dtype_of(input),
      dtype_of(grad_out),
      rows,
      size,
      g.stride,
      x.stride,
      g.tensor.const_data_ptr(),
      x.tensor.const_data_ptr(),
      data(weight),
      stats.const_data_ptr<float>(),
      stats.const_data_ptr<float>() + rows,
      data_of(grad_input),
      data_of(grad_weight),
      data_of(grad_bias)};
  Tensor parts;
  if (grad_weight.defined() || grad_bias.defined()) parts = at::empty({2, layer_norm_parts(b), size}, stats.options());
  C10_CUDA_CHECK(cuda::layer_norm_backward(b, static_cast<float*>(data_of(parts)), on.stream));
  return {grad_input, grad_weight, grad_bias};
}

// Asked once a device. Two threads may ask at once, and find the same.
bool load_on(c10::DeviceIndex device) {
  static std::array<std::atomic<signed char>, 128> known{};  // 0: not asked yet
  auto& answer = known[static_cast<size_t>(device) % known.size()];
  if (!answer) {
    const c10::cuda::CUDAGuard guard(device);
    answer = kernels_load() ? 1 : -1;
  }
  return answer > 0;
}
[[maybe_unused]] const bool told = (cuda_kernels_load = load_on, true);

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CUDA, m) {
  m.impl("layer_norm", layer_norm_cuda);
  m.impl("layer_norm_backward", layer_norm_backward_cuda);
}

}  // namespace nnfast::cuda
