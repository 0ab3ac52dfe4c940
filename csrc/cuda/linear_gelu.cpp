// Linear+GELU on a CUDA device: which GEMM, memory, and the way to the kernels.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "../ops/op.h"
#include "cuda.h"

namespace nnfast::cuda {
namespace {

void check(bool covered) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      covered, "nnfast::linear_gelu does not cover this call; nnfast.nn.functional hands it to torch");
}

Tensor gelu_cuda(const Tensor& self, c10::string_view approximate) {
  check(covers_gelu(self, approximate));
  const On on(self);
  // The output lies as the input does where that has no gaps, in rows where it has.
  const Tensor input = self.is_non_overlapping_and_dense() ? self : self.contiguous();
  Tensor output = at::empty_like(input);
  C10_CUDA_CHECK(
      cuda::gelu(
          dtype_of(input), approximate == "tanh", input.numel(), input.const_data_ptr(), output.mutable_data_ptr(),
          on.stream));
  return output;
}

// grad_out gelu'(x) and, where `grad_bias` is given, its sum over rows of grad_bias's size.
Tensor gelu_grad(const Tensor& grad, const Tensor& x, c10::string_view approximate, const Tensor& grad_bias) {
  const Tensor grad_input = at::empty_like(x);
  const int64_t size = grad_bias.defined() ? grad_bias.numel() : 1;
  const GeluBackward b{
      dtype_of(x),
      approximate == "tanh",
      size ? x.numel() / size : 0,
      size,
      grad.const_data_ptr(),
      x.const_data_ptr(),
      grad_input.mutable_data_ptr(),
      grad_bias.defined() ? grad_bias.mutable_data_ptr() : nullptr};
  Tensor parts;
  if (grad_bias.defined()) parts = at::empty({gelu_parts(b), size}, x.options().dtype(at::kFloat));
  C10_CUDA_CHECK(
      cuda::gelu_backward(
          b, parts.defined() ? parts.mutable_data_ptr<float>() : nullptr,
          c10::cuda::getCurrentCUDAStream(x.device().index())));
  return grad_input;
}

Tensor gelu_backward_cuda(const Tensor& grad_output, const Tensor& self, c10::string_view approximate) {
  check(covers_gelu(self, approximate));
  check_gelu_backward(grad_output, self);
  const On on(self);
  const Tensor x = self.is_non_overlapping_and_dense() ? self : at::empty_like(self).copy_(self);
  const Tensor grad = grad_output.strides() == x.strides() ? grad_output : at::empty_like(x).copy_(grad_output);
  return gelu_grad(grad, x, approximate, {});
}

std::tuple<Tensor, Tensor> gelu_backward_sum_cuda(
    const Tensor& grad_output, const Tensor& self, c10::string_view approximate) {
  check(covers_gelu(self, approximate) && self.dim() > 0);
  check_gelu_backward(grad_output, self);
  const On on(self);
  const Tensor grad_bias = at::empty({self.size(-1)}, self.options());
  return {gelu_grad(grad_output.contiguous(), self.contiguous(), approximate, grad_bias), grad_bias};
}

// What comes here has the dtype it shall have, also where a backward runs inside autocast.
Tensor gemm(const Tensor& input, const Tensor& weight, const OptTensor& bias = std::nullopt) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return at::linear(input, weight, bias);
}

// Both outputs from the one kernel of linear_gelu_sm90a.cu, where it was built, this is its GPU, and TMA can read the
// operands; x holds the rows of the input.
std::optional<std::tuple<Tensor, Tensor>> fused(
    const Tensor& x, const Tensor& weight, const OptTensor& bias, c10::string_view approximate, at::IntArrayRef sizes,
    const On& on) {
#ifdef NNFAST_SM90A
  const int64_t rows = x.size(0), in = x.size(1), out = weight.size(0);
  if (x.element_size() != 2 || rows == 0 || in == 0 || out == 0 || in % 8 || out % 8) return {};
  if (std::max({rows, in, out}) > std::numeric_limits<int>::max()) return {};
  const auto by_rows = [](const Tensor& t) {
    return t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  };
  if (!by_rows(x) || !by_rows(weight) || (defined(bias) && !by_rows(*bias))) return {};
  int major = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.device().index()));
  if (major != 9) return {};
  Tensor output = at::empty(sizes, x.options()), pre = at::empty(sizes, x.options());
  const LinearGelu f{
      dtype_of(x),
      approximate == "tanh",
      rows,
      in,
      out,
      x.const_data_ptr(),
      weight.const_data_ptr(),
      defined(bias) ? bias->const_data_ptr() : nullptr,
      output.mutable_data_ptr(),
      pre.mutable_data_ptr(),
      x.device().index()};
  const Tensor workspace = at::empty({linear_gelu_workspace(f)}, x.options().dtype(at::kByte));
  const char* error = cuda::linear_gelu(f, workspace.mutable_data_ptr(), on.stream);
  C10_CUDA_CHECK(cudaGetLastError());
  TORCH_CHECK(!error, "nnfast::linear_gelu: CUTLASS: ", error);
  return std::make_tuple(output, pre);
#else
  return {};
#endif
}

std::tuple<Tensor, Tensor> linear_gelu_cuda(
    const Tensor& input, const Tensor& weight, const OptTensor& bias, c10::string_view approximate,
    bool /* want_pre: the kernel writes it in any case */) {
  check(covers_linear_gelu(input, weight, bias, approximate));
  const On on(input);
  at::DimVector sizes(input.sizes());
  sizes.back() = weight.size(0);
  const Tensor x = input.reshape({-1, weight.size(1)});
  if (auto out = fused(x, weight, bias, approximate, sizes, on)) return *out;
  const Tensor pre = gemm(x, weight, bias).view(sizes);
  return {gelu_cuda(pre, approximate), pre};
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CUDA, m) {
  m.impl("gelu", gelu_cuda);
  m.impl("gelu_backward", gelu_backward_cuda);
  m.impl("gelu_backward_sum", gelu_backward_sum_cuda);
  m.impl("linear_gelu", linear_gelu_cuda);
}

}  // namespace nnfast::cuda
