// Linear+GELU on a CPU: memory and threads. The elementwise arithmetic is in linear_gelu.h.
#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <torch/library.h>

#include "../ops/op.h"
#include "../ops/paths.h"
#include "cpu.h"
#include "memory.h"
#include "product.h"

namespace nnfast {
namespace {

Path gelu_served("gelu"), gelu_backward_served("gelu_backward"), gelu_backward_sum_served("gelu_backward_sum"),
    served("linear_gelu"), in_blocks("linear_gelu.blocks");

// Threads get whole lines of memory, as streaming stores need.
constexpr int64_t kLine = 64;
void gelu_elements(const Gelu& f, int64_t count) {
  at::parallel_for(0, at::ceil_div(count, kLine), row_grain(kLine), [&](int64_t begin, int64_t end) {
    cpu_kernels()->gelu(f, begin * kLine, std::min(end * kLine, count));
  });
}

Tensor gelu_cpu(const Tensor& self, c10::string_view approximate) {
  check_covered(cpu_kernels() && covers_gelu(self, approximate), "gelu");
  gelu_served.taken();
  // ATen has vectorised functions for double.
  if (self.scalar_type() == at::kDouble) return at::gelu(self, approximate);
  const Tensor input = dense(self);
  Tensor output = input.is_contiguous() ? empty(self.sizes(), self.scalar_type()) : at::empty_like(input);
  gelu_elements(
      {.dtype = cpu_dtype(self),
       .tanh = approximate == "tanh",
       .input = input.const_data_ptr(),
       .output = output.mutable_data_ptr(),
       .copy = nullptr,
       .stream = may_stream(output, 2 * output.nbytes())},
      self.numel());
  return output;
}

GeluBackward gelu_grad(
    const Tensor& grad, const Tensor& x, c10::string_view approximate, int64_t size, const Tensor& out) {
  return {
      .dtype = cpu_dtype(x),
      .tanh = approximate == "tanh",
      .size = size,
      .grad_out = grad.const_data_ptr(),
      .pre = x.const_data_ptr(),
      .grad_pre = out.mutable_data_ptr()};
}

Tensor gelu_backward_cpu(const Tensor& grad_output, const Tensor& self, c10::string_view approximate) {
  check_covered(cpu_kernels() && covers_gelu(self, approximate), "gelu_backward");
  check_gelu_backward(grad_output, self);
  gelu_backward_served.taken();
  const Tensor x = dense(self), grad = laid_out(grad_output, x);
  if (x.scalar_type() == at::kDouble) return at::gelu_backward(grad, x, approximate);
  const Tensor grad_input = x.is_contiguous() ? empty(x.sizes(), x.scalar_type()) : at::empty_like(x);
  const GeluBackward b = gelu_grad(grad, x, approximate, 1, grad_input);
  at::parallel_for(0, x.numel(), row_grain(1), [&](int64_t begin, int64_t end) {
    cpu_kernels()->gelu_backward(b, nullptr, begin, end);
  });
  return grad_input;
}

std::tuple<Tensor, Tensor> gelu_backward_sum_cpu(
    const Tensor& grad_output, const Tensor& self, c10::string_view approximate) {
  check_covered(cpu_kernels() && covers_gelu(self, approximate) && self.dim() > 0, "gelu_backward_sum");
  check_gelu_backward(grad_output, self);
  gelu_backward_sum_served.taken();
  const Tensor grad = grad_output.contiguous(), x = self.contiguous();
  const int64_t size = x.size(-1), rows = size ? x.numel() / size : 0, threads = row_threads(rows, size);
  if (x.scalar_type() == at::kDouble) {
    const Tensor grad_input = at::gelu_backward(grad, x, approximate);
    return {grad_input, grad_input.view({rows, size}).sum(0)};
  }
  const Tensor grad_input = empty(x.sizes(), x.scalar_type());
  RowSums grad_bias(true, threads, size, x);
  const GeluBackward b = gelu_grad(grad, x, approximate, size, grad_input);
  for_each_block(rows, size, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    cpu_kernels()->gelu_backward(b, grad_bias.of(thread), begin, end);
    grad_bias.end_block(thread);
  });
  return {grad_input, grad_bias.total({size}, x.scalar_type())};
}

// How much of the product is computed before its GELU is taken: as much as stays in the cache till then.
// With AVX2 alone the number is one that no output reaches, for MKL multiplies a block more slowly than the whole: with
// blocks torch's forward in float32 took 0.93 to 1.21 times as long as ours, with none 1.03 to 1.38.
Threshold block_bytes(
    "linear_gelu.block_bytes", cpu_kernels() && cpu_kernels()->avx512 ? int64_t(8) << 20 : int64_t(1) << 40);

std::tuple<Tensor, Tensor> linear_gelu_cpu(
    const Tensor& input, const Tensor& weight, const OptTensor& bias, c10::string_view approximate, bool want_pre) {
  check_covered(cpu_kernels() && covers_linear_gelu(input, weight, bias, approximate), "linear_gelu");
  served.taken();
  const int64_t out = weight.size(0);
  at::DimVector sizes(input.sizes());
  sizes.back() = out;
  const Tensor x = input.reshape({-1, weight.size(1)});
  const int64_t rows = x.size(0), element = input.element_size();
  const int64_t block = std::max<int64_t>(128, block_bytes / std::max<int64_t>(1, out * element) / 128 * 128);
  if (rows < 2 * block || input.scalar_type() == at::kDouble) {
    const Tensor pre = product(x, weight, bias).view(sizes);
    return {gelu_cpu(pre, approximate), want_pre ? pre : empty({0}, input.scalar_type())};
  }
  in_blocks.taken();
  // The product's own memory is used over and over; pre and output are written once, where they stay.
  const Tensor output = empty(sizes, input.scalar_type());
  const Tensor pre = empty(want_pre ? at::IntArrayRef(sizes) : at::IntArrayRef({0}), input.scalar_type());
  const bool stream = may_stream(output, output.nbytes() + pre.nbytes());
  for (int64_t row = 0, count; row < rows; row += count) {
    // The last block is the longer one: every product is then large enough for the library that takes the whole.
    count = rows - row < 2 * block ? rows - row : block;
    const int64_t offset = row * out * element;
    const Tensor part = product(x.narrow(0, row, count), weight, bias);
    gelu_elements(
        {.dtype = cpu_dtype(input),
         .tanh = approximate == "tanh",
         .input = part.const_data_ptr(),
         .output = (char*)output.mutable_data_ptr() + offset,
         .copy = want_pre ? (char*)pre.mutable_data_ptr() + offset : nullptr,
         .stream = stream},
        count * out);
  }
  return {output, pre};
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CPU, m) {
  m.impl("gelu", gelu_cpu);
  m.impl("gelu_backward", gelu_backward_cpu);
  m.impl("gelu_backward_sum", gelu_backward_sum_cpu);
  m.impl("linear_gelu", linear_gelu_cpu);
}

}  // namespace nnfast
