// Linear+GELU on a CUDA device: which GEMM, memory, and the way to the kernels.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "../ops/op.h"
#include "../ops/paths.h"
#include "../ops/rows.h"
#include "cuda.h"

namespace nnfast::cuda {
namespace {

Tensor gelu_cuda(const Tensor& self, c10::string_view approximate) {
  check_covered(covers_gelu(self, approximate), "gelu");
  const On on(self);
  const Tensor input = dense(self);
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

// As y.sum() gives it: torch reads it where it lies, and ours would need a whole one.
bool expanded(const Tensor& grad) {
  for (int64_t i = 0; i < grad.dim(); ++i)
    if (grad.stride(i) == 0 && grad.size(i) > 1) return true;
  return false;
}

Tensor gelu_backward_cuda(const Tensor& grad_output, const Tensor& self, c10::string_view approximate) {
  check_covered(covers_gelu(self, approximate), "gelu_backward");
  check_gelu_backward(grad_output, self);
  const On on(self);
  const Tensor x = dense(self);
  if (expanded(grad_output)) return at::gelu_backward(grad_output, x, approximate);
  return gelu_grad(laid_out(grad_output, x), x, approximate, {});
}

std::tuple<Tensor, Tensor> gelu_backward_sum_cuda(
    const Tensor& grad_output, const Tensor& self, c10::string_view approximate) {
  check_covered(covers_gelu(self, approximate) && self.dim() > 0, "gelu_backward_sum");
  check_gelu_backward(grad_output, self);
  const On on(self);
  if (self.numel() && expanded(grad_output)) {
    const Tensor grad = at::gelu_backward(grad_output, self.contiguous(), approximate);
    return {grad, grad.view({-1, grad.size(-1)}).sum(0)};
  }
  const Tensor grad_bias = at::empty({self.size(-1)}, self.options());
  return {gelu_grad(grad_output.contiguous(), self.contiguous(), approximate, grad_bias), grad_bias};
}

// What comes here has the dtype it shall have, also where a backward runs inside autocast.
Tensor gemm(const Tensor& input, const Tensor& weight, const OptTensor& bias = std::nullopt) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return at::linear(input, weight, bias);
}

#ifdef NNFAST_SM90A
// From here on the epilogue takes less than a fiftieth of the products' time; a measurement should settle it.
Threshold cooperative_in("linear_gelu.cooperative_in", 16384);

bool by_rows(const Tensor& t) { return t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

// Whether CUTLASS's kernels serve this GPU and a product of these sizes; x is one of its operands.
bool for_sm90a(const Tensor& x, int64_t rows, int64_t in, int64_t out) {
  if (x.element_size() != 2 || rows == 0 || in == 0 || out == 0 || in % 8 || out % 8) return false;
  if (std::max({rows, in, out}) > std::numeric_limits<int>::max()) return false;
  int major = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.device().index()));
  if (major != 9) return false;
  // TMA's descriptors ask the driver for a context, and a thread of autograd's may have none yet.
  C10_CUDA_CHECK(cudaSetDevice(x.device().index()));
  return true;
}

void check_cutlass(const char* error, const char* op) {
  C10_CUDA_CHECK(cudaGetLastError());
  TORCH_CHECK(!error, "nnfast::", op, ": CUTLASS: ", error);
}
#endif

// Both outputs from the one kernel of linear_gelu_sm90a.cu, where it was built, this is its GPU, and TMA can read the
// operands; x holds the rows of the input. Without want_pre the second is empty.
std::optional<std::tuple<Tensor, Tensor>> fused(
    const Tensor& x, const Tensor& weight, const OptTensor& bias, c10::string_view approximate, bool want_pre,
    at::IntArrayRef sizes, const On& on) {
#ifdef NNFAST_SM90A
  const int64_t rows = x.size(0), in = x.size(1), out = weight.size(0);
  if (!by_rows(x) || !by_rows(weight) || (defined(bias) && !by_rows(*bias)) || !for_sm90a(x, rows, in, out)) return {};
  Tensor output = at::empty(sizes, x.options()), pre = at::empty(want_pre ? sizes : at::IntArrayRef({0}), x.options());
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
      want_pre ? pre.mutable_data_ptr() : nullptr,
      cooperative_in,
      x.device().index()};
  const Tensor workspace = at::empty({linear_gelu_workspace(f)}, x.options().dtype(at::kByte));
  check_cutlass(cuda::linear_gelu(f, workspace.mutable_data_ptr(), on.stream), "linear_gelu");
  return std::make_tuple(output, pre);
#else
  return {};
#endif
}

// All three gradients from the one kernel of linear_gelu_backward_sm90a.cu and the sum of its parts, in the same case.
std::optional<std::tuple<Tensor, Tensor, Tensor>> fused_backward(
    const Tensor& grad_output, const Tensor& weight_, const Tensor& self, c10::string_view approximate, const On& on) {
#ifdef NNFAST_SM90A
  const bool by_columns = !weight_.is_contiguous() && weight_.t().is_contiguous();
  const Tensor weight = by_columns ? weight_.t() : weight_;
  const int64_t out = weight_.size(0), in = weight_.size(1), rows = in ? self.numel() / in : 0;
  if (!by_rows(grad_output) || !by_rows(weight) || !by_rows(self) || !for_sm90a(self, rows, in, out)) return {};
  const Tensor grad = at::empty(self.sizes(), self.options()), grad_self = at::empty(self.sizes(), self.options());
  GeluLinearBackward b{
      dtype_of(self),
      approximate == "tanh",
      by_columns,
      rows,
      in,
      out,
      grad_output.const_data_ptr(),
      weight.const_data_ptr(),
      self.const_data_ptr(),
      grad.mutable_data_ptr(),
      grad_self.mutable_data_ptr(),
      nullptr,
      self.device().index()};
  const int64_t width = gelu_linear_width(b);
  const Tensor grad_bias = at::empty({width}, self.options());
  b.grad_bias = grad_bias.mutable_data_ptr();
  const Tensor parts = at::empty({gelu_linear_parts(b), width}, self.options().dtype(at::kFloat));
  const Tensor workspace = at::empty({gelu_linear_workspace(b)}, self.options().dtype(at::kByte));
  const char* error =
      cuda::gelu_linear_backward(b, parts.mutable_data_ptr<float>(), workspace.mutable_data_ptr(), on.stream);
  check_cutlass(error, "gelu_linear_backward");
  return std::make_tuple(grad, grad_self, grad_bias.narrow(0, 0, in));
#else
  return {};
#endif
}

std::tuple<Tensor, Tensor, Tensor> gelu_linear_backward_cuda(
    const Tensor& grad_output, const Tensor& weight, const Tensor& self, c10::string_view approximate) {
  check_gelu_linear_backward(grad_output, weight, self);
  check_covered(covers_gelu(self, approximate), "gelu_linear_backward");
  const On on(self);
  if (auto grads = fused_backward(grad_output, weight, self, approximate, on)) return *grads;
  const Tensor grad = gemm(grad_output, weight.t());
  return std::tuple_cat(std::make_tuple(grad), gelu_backward_sum_cuda(grad, self, approximate));
}

std::tuple<Tensor, Tensor> linear_gelu_cuda(
    const Tensor& input, const Tensor& weight, const OptTensor& bias, c10::string_view approximate, bool want_pre) {
  check_covered(covers_linear_gelu(input, weight, bias, approximate), "linear_gelu");
  const On on(input);
  at::DimVector sizes(input.sizes());
  sizes.back() = weight.size(0);
  const Tensor x = input.reshape({-1, weight.size(1)});
  if (auto out = fused(x, weight, bias, approximate, want_pre, sizes, on)) return *out;
  const Tensor pre = gemm(x, weight, bias).view(sizes);
  return {gelu_cuda(pre, approximate), want_pre ? pre : at::empty({0}, pre.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CUDA, m) {
  m.impl("gelu", gelu_cuda);
  m.impl("gelu_backward", gelu_backward_cuda);
  m.impl("gelu_backward_sum", gelu_backward_sum_cuda);
  m.impl("gelu_linear_backward", gelu_linear_backward_cuda);
  m.impl("linear_gelu", linear_gelu_cuda);
}

}  // namespace nnfast::cuda
