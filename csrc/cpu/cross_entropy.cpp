// Cross-entropy on a CPU, of logits and of what a linear layer makes them of: memory, threads, and the sum over rows.
// The arithmetic is in cross_entropy.h.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>
#include <ATen/core/Reduction.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <numeric>

#include "../ops/op.h"
#include "../ops/paths.h"
#include "cpu.h"
#include "memory.h"
#include "product.h"

namespace nnfast {
namespace {

Path forward("cross_entropy"), backward("cross_entropy_backward"), overwritten("cross_entropy_backward_"),
    linear_forward("linear_cross_entropy"), linear_backward("linear_cross_entropy_backward"),
    in_blocks("linear_cross_entropy.blocks");

// What forward and backward read alike. Every tensor of it is made here, before anything is written.
struct Logits {
  Logits(
      const Tensor& input, const Tensor& target_, const OptTensor& weight_, int64_t reduction, int64_t ignore_index,
      double label_smoothing, at::ScalarType dtype)
      : acc(at::toOpMathType(input.scalar_type())),
        size(input.size(class_dim(input))),
        rows(rows_of(input.dim() > 2 ? input.movedim(1, -1) : input, size, 1)),
        target(target_.contiguous()) {
    const bool covered =
        cpu_kernels() && covers_cross_entropy(input, target, weight_, ignore_index, label_smoothing, dtype);
    if (!covered) check_classes(target, size, ignore_index);  // in a compiled graph nobody has looked before
    check_covered(covered, "cross_entropy");
    if (defined(weight_)) weight = weight_->to(acc).contiguous();
    if (reduction == at::Reduction::Mean) total = *total_weight(target, weight_, size, ignore_index);
  }
  const void* weights() const { return weight.defined() ? weight.const_data_ptr() : nullptr; }

  at::ScalarType acc;
  int64_t size;
  Rows rows;
  Tensor target, weight;
  double total = 1;
};

// In double, and always in the same order: the result repeats, whatever the number of threads. Eight sums at once, as
// each addition waits for the one before it.
template <class A>
double sum(const Tensor& t) {
  constexpr int64_t kSums = 8;
  double sums[kSums] = {};
  const A* p = t.const_data_ptr<A>();
  const int64_t n = t.numel(), whole = n - n % kSums;
  for (int64_t i = 0; i < whole; i += kSums)
    for (int64_t k = 0; k < kSums; ++k) sums[k] += p[i + k];
  for (int64_t i = whole; i < n; ++i) sums[i - whole] += p[i];
  return std::accumulate(sums, sums + kSums, 0.0);
}

Tensor reduced(const Tensor& losses, int64_t reduction, double total, at::ScalarType type) {
  if (reduction == at::Reduction::None) return losses.to(type);
  const double value = (losses.scalar_type() == at::kDouble ? sum<double>(losses) : sum<float>(losses)) / total;
  Tensor output = empty({}, type);
  // Past the dtype's range it is infinity, as torch's; fill_() would raise.
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "cross_entropy", [&] {
    *output.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(value);
  });
  return output;
}

void cross_entropy_losses(
    const Tensor& input, const Logits& x, int64_t ignore_index, double label_smoothing, const Tensor& stats,
    const Tensor& losses) {
  const int64_t rows = x.target.numel();
  const CrossEntropyForward f{
      .dtype = cpu_dtype(input),
      .size = x.size,
      .input_stride = x.rows.stride,
      .smoothing = label_smoothing,
      .ignore_index = ignore_index,
      .input = x.rows.tensor.const_data_ptr(),
      .target = x.target.const_data_ptr<int64_t>(),
      .weight = x.weights(),
      .max = stats.mutable_data_ptr(),
      .sum = (char*)stats.mutable_data_ptr() + rows * stats.element_size(),
      .loss = losses.mutable_data_ptr()};
  at::parallel_for(
      0, rows, row_grain(x.size), [&](int64_t begin, int64_t end) { cpu_kernels()->cross_entropy(f, begin, end); });
}

std::tuple<Tensor, Tensor> cross_entropy_cpu(
    const Tensor& input, const Tensor& target, const OptTensor& weight, int64_t reduction, int64_t ignore_index,
    double label_smoothing, std::optional<at::ScalarType> dtype) {
  const auto type = dtype.value_or(input.scalar_type());
  const Logits x(input, target, weight, reduction, ignore_index, label_smoothing, type);
  forward.taken();
  const int64_t rows = target.numel();
  Tensor stats = empty({2, rows}, x.acc), losses = empty(target.sizes(), x.acc);
  cross_entropy_losses(input, x, ignore_index, label_smoothing, stats, losses);
  return {reduced(losses, reduction, x.total, type), stats};
}

// Shorter rows are not written past the caches: the class's own element comes last and would fetch its line again,
// which took 400 ns a row where the row itself takes 30. Few classes, whose rows are written whole, gained nothing by
// it.
Threshold streamed_row("cross_entropy.streamed_row_bytes", 2048);

// The gradient is written to grad_input, rows of it one after another.
void cross_entropy_grad(
    const Tensor& grad_out, const Tensor& input, const Tensor& stats, const Logits& x, int64_t reduction,
    int64_t ignore_index, double label_smoothing, const Tensor& grad_input, bool check_input = false) {
  const int64_t rows = x.target.numel();
  const bool each = reduction == at::Reduction::None;
  const Tensor grad = grad_out.to(x.acc).contiguous();
  TORCH_CHECK(
      grad.numel() == (each ? rows : 1) && grad.is_cpu() && stats.numel() == 2 * rows && stats.is_contiguous() &&
          stats.scalar_type() == x.acc && stats.is_cpu(),
      "nnfast::cross_entropy_backward: grad_out and stats must be as the forward's output and stats");
  double all_weights = (double)x.size;
  if (x.weight.defined() && label_smoothing != 0)
    all_weights = x.acc == at::kDouble ? sum<double>(x.weight) : sum<float>(x.weight);
  const bool in_place = grad_input.const_data_ptr() == x.rows.tensor.const_data_ptr();
  bool changed = false;
  const CrossEntropyBackward b{
      .dtype = cpu_dtype(input),
      .size = x.size,
      .input_stride = x.rows.stride,
      .grad_stride = each,
      .smoothing = label_smoothing,
      .ignore_index = ignore_index,
      .all_weights = all_weights,
      .total_weight = x.total,
      .input = x.rows.tensor.const_data_ptr(),
      .target = x.target.const_data_ptr<int64_t>(),
      .weight = x.weights(),
      .max = stats.const_data_ptr(),
      .sum = (const char*)stats.const_data_ptr() + rows * stats.element_size(),
      .grad = grad.const_data_ptr(),
      .grad_input = grad_input.mutable_data_ptr(),
      .stream = !in_place && x.size * grad_input.element_size() >= streamed_row &&
                may_stream(grad_input.nbytes() + input.nbytes()),
      .changed = &changed};
  at::parallel_for(0, rows, row_grain(x.size), [&](int64_t begin, int64_t end) {
    cpu_kernels()->cross_entropy_backward(b, begin, end);
  });
  if (!changed || !check_input) return;
  if (in_place) grad_input.fill_(NAN);  // a second try would take the gradient for logits: it raises too
  TORCH_CHECK(
      false,
      "one of the variables needed for gradient computation has been modified by an inplace operation: the logits of a "
      "cross_entropy were changed before its backward in a way that autograd does not count, by .data or .numpy(). "
      "Change a copy of them (.clone()), or call backward() first.");
}

Tensor cross_entropy_backward_cpu(
    const Tensor& grad_out, const Tensor& input, const Tensor& stats, const Tensor& target, const OptTensor& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing, bool check_input) {
  const Logits x(input, target, weight, reduction, ignore_index, label_smoothing, grad_out.scalar_type());
  backward.taken();
  Tensor grad_input = empty(x.rows.tensor.sizes(), input.scalar_type());
  cross_entropy_grad(grad_out, input, stats, x, reduction, ignore_index, label_smoothing, grad_input, check_input);
  return input.dim() > 2 ? grad_input.movedim(-1, 1) : grad_input;
}

void cross_entropy_backward_cpu_(
    const Tensor& grad_out, const Tensor& input, const Tensor& stats, const Tensor& target, const OptTensor& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing, bool check_input) {
  TORCH_CHECK(input.is_contiguous() && input.dim() <= 2);
  const Logits x(input, target, weight, reduction, ignore_index, label_smoothing, grad_out.scalar_type());
  overwritten.taken();
  cross_entropy_grad(grad_out, input, stats, x, reduction, ignore_index, label_smoothing, input, check_input);
}

// The logits of a block of rows take so many bytes: few enough to be little beside the weight and its gradient, enough
// that adding a block's part to that gradient is little beside its three products.
Threshold block_bytes("linear_cross_entropy.block_bytes", int64_t(64) << 20);
// The weight's gradient is added up so many bytes at a time, which stay in the cache.
Threshold part_bytes("linear_cross_entropy.part_bytes", int64_t(16) << 20);

// The loss, and the gradients that the mask asks for. grad_out, by default 1, is the loss's: one number, or one a row.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_in_blocks(
    const OptTensor& grad_out, const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const OptTensor& linear_bias, const OptTensor& weight, int64_t reduction, int64_t ignore_index,
    double label_smoothing, at::ScalarType type, std::array<bool, 3> mask) {
  const bool covered =
      cpu_kernels() && covers_linear_cross_entropy(
                           input, linear_weight, target, linear_bias, weight, ignore_index, label_smoothing, type);
  if (!covered && linear_weight.dim() == 2) check_classes(target, linear_weight.size(0), ignore_index);
  check_covered(covered, "linear_cross_entropy");
  const int64_t rows = input.size(0), features = input.size(1), classes = linear_weight.size(0);
  const int64_t at_most = std::max<int64_t>(1, block_bytes / (classes * input.element_size()));
  const int64_t blocks = std::max<int64_t>(1, at::ceil_div(rows, at_most)), block = at::ceil_div(rows, blocks);
  const int64_t part = std::max<int64_t>(1, part_bytes / (features * input.element_size()));
  if (blocks > 1) in_blocks.taken();
  const bool each = reduction == at::Reduction::None;
  const double total = reduction == at::Reduction::Mean ? *total_weight(target, weight, classes, ignore_index) : 1.0;
  const auto dtype = input.scalar_type(), acc = at::toOpMathType(dtype);
  const bool backward = mask[0] || mask[1] || mask[2];
  const Tensor losses = empty({rows}, acc), w_t = linear_weight.t();
  const Tensor one = at::ones({}, at::TensorOptions(acc)), grad = defined(grad_out) ? *grad_out : one;
  Tensor grad_input = mask[0] ? empty({rows, features}, dtype) : Tensor();
  Tensor grad_weight = mask[1] && blocks > 1 ? empty({classes, features}, acc) : Tensor(), grad_bias;
  if (rows == 0) {
    if (mask[1]) grad_weight = at::zeros({classes, features}, input.options());
    if (mask[2]) grad_bias = at::zeros({classes}, input.options());
  }
  for (int64_t row = 0; row < rows; row += block) {
    const int64_t count = std::min(block, rows - row);
    const Tensor x = input.narrow(0, row, count), y = target.narrow(0, row, count);
    const Tensor logits = product(x, linear_weight, linear_bias).contiguous();
    Logits l(logits, y, weight, at::Reduction::None, ignore_index, label_smoothing, type);
    const Tensor stats = empty({2, count}, acc);
    cross_entropy_losses(logits, l, ignore_index, label_smoothing, stats, losses.narrow(0, row, count));
    if (!backward) continue;
    l.total = total;
    cross_entropy_grad(
        each ? grad.narrow(0, row, count) : grad, logits, stats, l, reduction, ignore_index, label_smoothing, logits);
    if (mask[0]) grad_input.narrow(0, row, count).copy_(product(logits, w_t));
    if (mask[1] && blocks == 1) grad_weight = product(logits.t(), x.t());
    if (mask[1] && blocks > 1)
      for (int64_t c = 0; c < classes; c += part) {
        const int64_t some = std::min(part, classes - c);
        const Tensor sum = grad_weight.narrow(0, c, some), added = product(logits.narrow(1, c, some).t(), x.t());
        row == 0 ? sum.copy_(added) : sum.add_(added);
      }
    if (mask[2]) {
      const Tensor added = logits.sum(0, false, acc);
      grad_bias = row == 0 ? added : grad_bias.add_(added);
    }
  }
  const auto rounded = [&](const Tensor& t) { return t.defined() ? t.to(dtype) : t; };
  return {reduced(losses, reduction, total, type), grad_input, rounded(grad_weight), rounded(grad_bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_cpu(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target, const OptTensor& linear_bias,
    const OptTensor& weight, int64_t reduction, int64_t ignore_index, double label_smoothing,
    std::optional<at::ScalarType> dtype, std::array<bool, 3> output_mask) {
  linear_forward.taken();
  return linear_cross_entropy_in_blocks(
      std::nullopt, input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing,
      dtype.value_or(input.scalar_type()), output_mask);
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward_cpu(
    const Tensor& grad_out, const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const OptTensor& linear_bias, const OptTensor& weight, int64_t reduction, int64_t ignore_index,
    double label_smoothing, std::array<bool, 3> output_mask) {
  linear_backward.taken();
  auto [loss, grad_input, grad_weight, grad_bias] = linear_cross_entropy_in_blocks(
      grad_out, input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing,
      grad_out.scalar_type(), output_mask);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CPU, m) {
  m.impl("cross_entropy", cross_entropy_cpu);
  m.impl("cross_entropy_backward", cross_entropy_backward_cpu);
  m.impl("cross_entropy_backward_", cross_entropy_backward_cpu_);
  m.impl("linear_cross_entropy", linear_cross_entropy_cpu);
  m.impl("linear_cross_entropy_backward", linear_cross_entropy_backward_cpu);
}

}  // namespace nnfast
