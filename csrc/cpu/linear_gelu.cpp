// Linear+GELU on a CPU: which library's GEMM, memory and threads. The elementwise arithmetic is in linear_gelu.h.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "../op.h"
#include "cpu.h"
#include "memory.h"

namespace nnfast {
namespace {

constexpr int64_t kElementGrain = 16384;

void check(bool covered) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      cpu_kernels() && covered, "nnfast::linear_gelu does not cover this call; nnfast.nn.functional hands it to torch");
}

// torch multiplies float32 with MKL, and oneDNN is at hand in the same library: 1.1 times as fast on a Zen 4, 1.9
// times on a Zen 5, slower only where the call costs more than the product. 16-bit products are oneDNN's anyway.
constexpr int64_t kOneDnnMultiplyAdds = 2'000'000;

using OneDnnLinear = Tensor(
    const Tensor&, const Tensor&, const OptTensor&, c10::string_view, c10::List<std::optional<at::Scalar>>,
    std::optional<c10::string_view>);

// input weight^T + bias for two matrices.
Tensor gemm(const Tensor& input, const Tensor& weight, const OptTensor& bias = std::nullopt) {
  static const auto one_dnn = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  const auto& context = at::globalContext();
  const auto precision = context.float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  // Where the user lets float32 products run in a lower precision, torch decides how.
  const bool exact = precision != at::Float32Precision::BF16 && precision != at::Float32Precision::TF32;
  if (one_dnn && input.scalar_type() == at::kFloat && exact && context.userEnabledMkldnn() &&
      input.size(0) * input.size(1) * weight.size(0) >= kOneDnnMultiplyAdds)
    return one_dnn->typed<OneDnnLinear>().call(input, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
  return at::linear(input, weight, bias);
}

Tensor gelu_cpu(const Tensor& self, c10::string_view approximate) {
  check(covers_gelu(self, approximate));
  Tensor output = at::empty_like(self);
  const Tensor input = self.strides() == output.strides() ? self : at::empty_like(output).copy_(self);
  const Gelu f{cpu_dtype(self), approximate == "tanh", input.const_data_ptr(), output.mutable_data_ptr()};
  at::parallel_for(
      0, self.numel(), kElementGrain, [&](int64_t begin, int64_t end) { cpu_kernels()->gelu(f, begin, end); });
  return output;
}

// grad_pre = grad_out gelu'(pre) and, where wanted, its sum over the rows.
std::tuple<Tensor, RowSums> gelu_grad(
    const Tensor& grad_out, const Tensor& pre, int64_t size, c10::string_view approximate, bool want_bias) {
  const Tensor grad = grad_out.contiguous(), x = pre.contiguous();
  Tensor grad_pre = empty(pre.sizes(), pre.scalar_type());
  const int64_t rows = size ? pre.numel() / size : 0, threads = row_threads(rows, size);
  RowSums grad_bias(want_bias, threads, size, pre);
  const GeluBackward b{cpu_dtype(pre),        approximate == "tanh", size,
                       grad.const_data_ptr(), x.const_data_ptr(),    grad_pre.mutable_data_ptr()};
  if (want_bias)
    for_each_block(rows, threads, [&](int64_t thread, int64_t begin, int64_t end) {
      cpu_kernels()->gelu_backward(b, grad_bias.of(thread), begin, end);
      grad_bias.end_block(thread);
    });
  else
    at::parallel_for(0, rows, row_grain(size), [&](int64_t begin, int64_t end) {
      cpu_kernels()->gelu_backward(b, nullptr, begin, end);
    });
  return {grad_pre, grad_bias};
}

Tensor gelu_backward_cpu(const Tensor& grad_output, const Tensor& self, c10::string_view approximate) {
  check(covers_gelu(self, approximate));
  return std::get<0>(gelu_grad(grad_output, self, 1, approximate, false));
}

std::tuple<Tensor, Tensor> linear_gelu_cpu(
    const Tensor& input, const Tensor& weight, const OptTensor& bias, c10::string_view approximate) {
  check(covers_linear_gelu(input, weight, bias, approximate));
  at::DimVector sizes(input.sizes());
  sizes.back() = weight.size(0);
  const Tensor pre = gemm(input.reshape({-1, weight.size(1)}), weight, bias).view(sizes);
  return {gelu_cpu(pre, approximate), pre};
}

std::tuple<Tensor, Tensor, Tensor> linear_gelu_backward_cpu(
    const Tensor& grad_out, const Tensor& input, const Tensor& weight, const Tensor& pre, c10::string_view approximate,
    std::array<bool, 3> output_mask) {
  check(covers_linear_gelu(input, weight, std::nullopt, approximate));
  const int64_t out = weight.size(0), in = weight.size(1);
  const auto [grad_pre, grad_bias] = gelu_grad(grad_out, pre, out, approximate, output_mask[2]);
  const Tensor d = grad_pre.view({-1, out});
  return {
      output_mask[0] ? gemm(d, weight.t()).view(input.sizes()) : Tensor(),
      output_mask[1] ? gemm(d.t(), input.reshape({-1, in}).t()) : Tensor(), grad_bias.total({out}, pre.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CPU, m) {
  m.impl("gelu", gelu_cpu);
  m.impl("gelu_backward", gelu_backward_cpu);
  m.impl("linear_gelu", linear_gelu_cpu);
  m.impl("linear_gelu_backward", linear_gelu_backward_cpu);
}

}  // namespace nnfast
