// Linear+GELU on a CPU: memory and threads. The elementwise arithmetic is in linear_gelu.h.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <torch/library.h>

#include "../gate/paths.h"
#include "../ops/op.h"
#include "cpu.h"
#include "memory.h"
#include "product.h"

namespace nnfast {
namespace {

Path gelu_served("gelu"), gelu_backward_served("gelu_backward"), served("linear_gelu"),
    backward_served("linear_gelu_backward"), in_blocks("linear_gelu.blocks");

void check(bool covered) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      cpu_kernels() && covered, "nnfast::linear_gelu does not cover this call; nnfast.nn.functional hands it to torch");
}

// Threads get whole lines of memory, as streaming stores need.
constexpr int64_t kLine = 64;
void gelu_elements(const Gelu& f, int64_t count) {
  at::parallel_for(0, (count + kLine - 1) / kLine, row_grain(kLine), [&](int64_t begin, int64_t end) {
    cpu_kernels()->gelu(f, begin * kLine, std::min(end * kLine, count));
  });
}

Tensor gelu_cpu(const Tensor& self, c10::string_view approximate) {
  check(covers_gelu(self, approximate));
  gelu_served.taken();
  // ATen has a vector of doubles' tanh, and takes two thirds of our time.
  if (self.scalar_type() == at::kDouble && approximate == "tanh") return at::gelu(self, approximate);
  // The output's dimensions follow each other in memory as the input's do, without its gaps.
  const Tensor input = self.is_non_overlapping_and_dense() ? self : at::empty_like(self).copy_(self);
  Tensor output = input.is_contiguous() ? empty(self.sizes(), self.scalar_type()) : at::empty_like(input);
  gelu_elements(
      {cpu_dtype(self), approximate == "tanh", input.const_data_ptr(), output.mutable_data_ptr(), nullptr,
       may_stream(output, 2 * output.nbytes())},
      self.numel());
  return output;
}

// grad_pre = grad_out gelu'(pre) and, where wanted, its sum over the rows. grad_pre may be pre.
RowSums gelu_grad(
    const Tensor& grad_pre, const Tensor& grad_out, const Tensor& pre, int64_t size, c10::string_view approximate,
    bool want_bias) {
  const Tensor grad = grad_out.contiguous(), x = pre.contiguous();
  const int64_t rows = size ? pre.numel() / size : 0, threads = row_threads(rows, size);
  RowSums grad_bias(want_bias, threads, size, pre);
  const GeluBackward b{cpu_dtype(pre),        approximate == "tanh", size,
                       grad.const_data_ptr(), x.const_data_ptr(),    grad_pre.mutable_data_ptr()};
  if (want_bias)
    for_each_block(rows, size, threads, [&](int64_t thread, int64_t begin, int64_t end) {
      cpu_kernels()->gelu_backward(b, grad_bias.of(thread), begin, end);
      grad_bias.end_block(thread);
    });
  else
    at::parallel_for(0, rows, row_grain(size), [&](int64_t begin, int64_t end) {
      cpu_kernels()->gelu_backward(b, nullptr, begin, end);
    });
  return grad_bias;
}

Tensor gelu_backward_cpu(const Tensor& grad_output, const Tensor& self, c10::string_view approximate) {
  check(covers_gelu(self, approximate));
  gelu_backward_served.taken();
  Tensor grad_input = empty(self.sizes(), self.scalar_type());
  gelu_grad(grad_input, grad_output, self, 1, approximate, false);
  return grad_input;
}

// How much of the product is computed before its GELU is taken: as much as stays in the cache till then.
Threshold block_bytes("linear_gelu.block_bytes", int64_t(8) << 20);

std::tuple<Tensor, Tensor> linear_gelu_cpu(
    const Tensor& input, const Tensor& weight, const OptTensor& bias, c10::string_view approximate) {
  check(covers_linear_gelu(input, weight, bias, approximate));
  served.taken();
  const int64_t out = weight.size(0);
  at::DimVector sizes(input.sizes());
  sizes.back() = out;
  const Tensor x = input.reshape({-1, weight.size(1)});
  const int64_t rows = x.size(0), element = input.element_size();
  const int64_t block = std::max<int64_t>(128, block_bytes / std::max<int64_t>(1, out * element) / 128 * 128);
  if (rows < 2 * block || input.scalar_type() == at::kDouble) {
    const Tensor pre = product(x, weight, bias).view(sizes);
    return {gelu_cpu(pre, approximate), pre};
  }
  in_blocks.taken();
  // The product's own memory is used over and over; pre and output are written once, where they stay.
  Tensor output = empty(sizes, input.scalar_type()), pre = empty(sizes, input.scalar_type());
  const bool stream = may_stream(output, 2 * output.nbytes());
  for (int64_t row = 0; row < rows; row += block) {
    const int64_t count = std::min(block, rows - row), offset = row * out * element;
    const Tensor part = product(x.narrow(0, row, count), weight, bias);
    gelu_elements(
        {cpu_dtype(input), approximate == "tanh", part.const_data_ptr(), (char*)output.mutable_data_ptr() + offset,
         (char*)pre.mutable_data_ptr() + offset, stream},
        count * out);
  }
  return {output, pre};
}

template <bool overwrite>
std::tuple<Tensor, Tensor, Tensor> linear_gelu_backward_cpu(
    const Tensor& grad_out, const Tensor& input, const Tensor& weight, const Tensor& pre, c10::string_view approximate,
    std::array<bool, 3> output_mask) {
  check(covers_linear_gelu(input, weight, std::nullopt, approximate));
  backward_served.taken();
  const int64_t out = weight.size(0), in = weight.size(1);
  const Tensor grad_pre = overwrite && pre.is_contiguous() ? pre : empty(pre.sizes(), pre.scalar_type());
  const RowSums grad_bias = gelu_grad(grad_pre, grad_out, pre, out, approximate, output_mask[2]);
  const Tensor d = grad_pre.view({-1, out});
  return {
      output_mask[0] ? product(d, weight.t()).view(input.sizes()) : Tensor(),
      output_mask[1] ? product_tn(d, input.reshape({-1, in})) : Tensor(), grad_bias.total({out}, pre.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CPU, m) {
  m.impl("gelu", gelu_cpu);
  m.impl("gelu_backward", gelu_backward_cpu);
  m.impl("linear_gelu", linear_gelu_cpu);
  m.impl("linear_gelu_backward", linear_gelu_backward_cpu<false>);
  m.impl("linear_gelu_backward_", linear_gelu_backward_cpu<true>);
}

}  // namespace nnfast
