// Cross-entropy on a CPU: memory, threads, and the sum over rows. The arithmetic is in cross_entropy.h.
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Reduction.h>
#include <torch/library.h>

#include "../gate/paths.h"
#include "../ops/op.h"
#include "cpu.h"
#include "memory.h"

namespace nnfast {
namespace {

Path forward("cross_entropy"), backward("cross_entropy_backward"), overwritten("cross_entropy_backward_");

// What forward and backward read alike. Every tensor of it is made here, before anything is written.
struct Logits {
  Logits(
      const Tensor& input, const Tensor& target_, const OptTensor& weight_, int64_t reduction, int64_t ignore_index,
      double label_smoothing, at::ScalarType dtype)
      : acc(at::toOpMathType(input.scalar_type())),
        size(input.size(input.dim() == 1 ? 0 : 1)),
        rows(rows_of(input.dim() > 2 ? input.movedim(1, -1) : input, size, 1)),
        target(target_.contiguous()) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        cpu_kernels() && covers_cross_entropy(input, target, weight_, ignore_index, label_smoothing, dtype),
        "nnfast::cross_entropy does not cover this call; nnfast.nn.functional.cross_entropy hands it to torch");
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

// One after another, in double: the result repeats, whatever the number of threads.
template <class A>
double sum(const Tensor& t) {
  double total = 0;
  const A* p = t.const_data_ptr<A>();
  for (int64_t i = 0; i < t.numel(); ++i) total += p[i];
  return total;
}

std::tuple<Tensor, Tensor> cross_entropy_cpu(
    const Tensor& input, const Tensor& target, const OptTensor& weight, int64_t reduction, int64_t ignore_index,
    double label_smoothing, std::optional<at::ScalarType> dtype) {
  const auto type = dtype.value_or(input.scalar_type());
  const Logits x(input, target, weight, reduction, ignore_index, label_smoothing, type);
  forward.taken();
  const int64_t rows = target.numel();
  Tensor stats = empty({2, rows}, x.acc), losses = empty(target.sizes(), x.acc);
  const CrossEntropyForward f{
      cpu_dtype(input),
      x.size,
      x.rows.stride,
      label_smoothing,
      ignore_index,
      x.rows.tensor.const_data_ptr(),
      x.target.const_data_ptr<int64_t>(),
      x.weights(),
      stats.mutable_data_ptr(),
      (char*)stats.mutable_data_ptr() + rows * stats.element_size(),
      losses.mutable_data_ptr()};
  at::parallel_for(
      0, rows, row_grain(x.size), [&](int64_t begin, int64_t end) { cpu_kernels()->cross_entropy(f, begin, end); });
  if (reduction == at::Reduction::None) return {losses.to(type), stats};
  const double loss = (x.acc == at::kDouble ? sum<double>(losses) : sum<float>(losses)) / x.total;
  Tensor output = empty({}, type);
  output.fill_(loss);
  return {output, stats};
}

// The gradient is written to grad_input, rows of it one after another.
void cross_entropy_grad(
    const Tensor& grad_out, const Tensor& input, const Tensor& stats, const Logits& x, int64_t reduction,
    int64_t ignore_index, double label_smoothing, const Tensor& grad_input) {
  const int64_t rows = x.target.numel();
  const bool each = reduction == at::Reduction::None;
  const Tensor grad = grad_out.to(x.acc).contiguous();
  TORCH_CHECK(grad.numel() == (each ? rows : 1) && stats.numel() == 2 * rows && stats.is_contiguous());
  double all_weights = (double)x.size;
  if (x.weight.defined() && label_smoothing != 0)
    all_weights = x.acc == at::kDouble ? sum<double>(x.weight) : sum<float>(x.weight);
  const bool in_place = grad_input.const_data_ptr() == x.rows.tensor.const_data_ptr();
  const CrossEntropyBackward b{
      cpu_dtype(input),
      x.size,
      x.rows.stride,
      each,
      label_smoothing,
      ignore_index,
      all_weights,
      x.total,
      x.rows.tensor.const_data_ptr(),
      x.target.const_data_ptr<int64_t>(),
      x.weights(),
      stats.const_data_ptr(),
      (const char*)stats.const_data_ptr() + rows * stats.element_size(),
      grad.const_data_ptr(),
      grad_input.mutable_data_ptr(),
      !in_place && may_stream(grad_input.nbytes() + input.nbytes())};
  at::parallel_for(0, rows, row_grain(x.size), [&](int64_t begin, int64_t end) {
    cpu_kernels()->cross_entropy_backward(b, begin, end);
  });
}

Tensor cross_entropy_backward_cpu(
    const Tensor& grad_out, const Tensor& input, const Tensor& stats, const Tensor& target, const OptTensor& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing) {
  const Logits x(input, target, weight, reduction, ignore_index, label_smoothing, grad_out.scalar_type());
  backward.taken();
  Tensor grad_input = empty(x.rows.tensor.sizes(), input.scalar_type());
  cross_entropy_grad(grad_out, input, stats, x, reduction, ignore_index, label_smoothing, grad_input);
  return input.dim() > 2 ? grad_input.movedim(-1, 1) : grad_input;
}

void cross_entropy_backward_cpu_(
    const Tensor& grad_out, const Tensor& input, const Tensor& stats, const Tensor& target, const OptTensor& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing) {
  TORCH_CHECK(input.is_contiguous() && input.dim() <= 2);
  const Logits x(input, target, weight, reduction, ignore_index, label_smoothing, grad_out.scalar_type());
  overwritten.taken();
  cross_entropy_grad(grad_out, input, stats, x, reduction, ignore_index, label_smoothing, input);
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CPU, m) {
  m.impl("cross_entropy", cross_entropy_cpu);
  m.impl("cross_entropy_backward", cross_entropy_backward_cpu);
  m.impl("cross_entropy_backward_", cross_entropy_backward_cpu_);
}

}  // namespace nnfast
