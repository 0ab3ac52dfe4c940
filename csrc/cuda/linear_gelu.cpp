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

// grad_pre = grad_out gelu'(pre) and, where wanted, its sum over the rows of `size`. grad_pre may be pre.
Tensor gelu_grad(
    const Tensor& grad_pre, const Tensor& grad_out, const Tensor& pre, int64_t size, c10::string_view approximate,
    bool want_bias) {
  const Tensor grad = grad_out.contiguous(), x = pre.contiguous();
  Tensor grad_bias, parts;
  if (want_bias) grad_bias = at::empty({size}, pre.options());
  const GeluBackward b{
      dtype_of(pre),
      approximate == "tanh",
      size ? pre.numel() / size : 0,
      size,
      grad.const_data_ptr(),
      x.const_data_ptr(),
      grad_pre.mutable_data_ptr(),
      want_bias ? grad_bias.mutable_data_ptr() : nullptr};
  if (want_bias) parts = at::empty({gelu_parts(b), size}, pre.options().dtype(at::kFloat));
  C10_CUDA_CHECK(
      cuda::gelu_backward(
          b, want_bias ? parts.mutable_data_ptr<float>() : nullptr,
          c10::cuda::getCurrentCUDAStream(pre.device().index())));
  return grad_bias;
}

Tensor gelu_backward_cuda(const Tensor& grad_output, const Tensor& self, c10::string_view approximate) {
  check(covers_gelu(self, approximate));
  const On on(self);
  Tensor grad_input = at::empty(self.sizes(), self.options());
  gelu_grad(grad_input, grad_output, self, 1, approximate, false);
  return grad_input;
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
    const Tensor& input, const Tensor& weight, const OptTensor& bias, c10::string_view approximate) {
  check(covers_linear_gelu(input, weight, bias, approximate));
  const On on(input);
  at::DimVector sizes(input.sizes());
  sizes.back() = weight.size(0);
  const Tensor x = input.reshape({-1, weight.size(1)});
  if (auto out = fused(x, weight, bias, approximate, sizes, on)) return *out;
  const Tensor pre = gemm(x, weight, bias).view(sizes);
  return {gelu_cuda(pre, approximate), pre};
}

template <bool overwrite>
std::tuple<Tensor, Tensor, Tensor> linear_gelu_backward_cuda(
    const Tensor& grad_out, const Tensor& input, const Tensor& weight, const Tensor& pre, c10::string_view approximate,
    std::array<bool, 3> output_mask) {
  check(covers_linear_gelu(input, weight, std::nullopt, approximate));
  const On on(input);
  const int64_t out = weight.size(0), in = weight.size(1);
  const Tensor grad_pre = overwrite && pre.is_contiguous() ? pre : at::empty(pre.sizes(), pre.options());
  const Tensor grad_bias = gelu_grad(grad_pre, grad_out, pre, out, approximate, output_mask[2]);
  const Tensor d = grad_pre.view({-1, out});
  return {
      output_mask[0] ? gemm(d, weight.t()).view(input.sizes()) : Tensor(),
      output_mask[1] ? gemm(d.t(), input.reshape({-1, in}).t()) : Tensor(), grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CUDA, m) {
  m.impl("gelu", gelu_cuda);
  m.impl("gelu_backward", gelu_backward_cuda);
  m.impl("linear_gelu", linear_gelu_cuda);
  m.impl("linear_gelu_backward", linear_gelu_backward_cuda<false>);
  m.impl("linear_gelu_backward_", linear_gelu_backward_cuda<true>);
}

}  // namespace nnfast::cuda
