// The contract of LayerNorm: schema, which calls are covered, shapes, autograd, autocast.
#include <ATen/OpMathType.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/layer_norm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "op.h"

namespace nnfast {

TORCH_LIBRARY_FRAGMENT(nnfast, m) {
  // output, and the mean and reciprocal standard deviation of each row, in float (double for float64 input).
  m.def(
      "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps)"
      " -> (Tensor output, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor grad_out, Tensor input, SymInt[] normalized_shape, Tensor mean, Tensor rstd,"
      " Tensor? weight, Tensor? bias, bool[3] output_mask)"
      " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(
    const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptTensor& weight, const OptTensor& bias,
    double eps) {
  static const auto op = find_op<decltype(layer_norm)>("layer_norm");
  return op.call(input, normalized_shape, weight, bias, eps);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& grad_out, const Tensor& input, c10::SymIntArrayRef normalized_shape, const Tensor& mean,
    const Tensor& rstd, const OptTensor& weight, const OptTensor& bias, std::array<bool, 3> output_mask) {
  static const auto op = find_op<decltype(layer_norm_backward)>("layer_norm_backward");
  return op.call(grad_out, input, normalized_shape, mean, rstd, weight, bias, output_mask);
}

bool covers_layer_norm(
    const Tensor& input, at::IntArrayRef normalized_shape, const OptTensor& weight, const OptTensor& bias) {
  const auto dtype = input.scalar_type();
  const bool half = dtype == at::kBFloat16 || dtype == at::kHalf;
  if (!half && dtype != at::kFloat && dtype != at::kDouble) return false;
  const auto dim = input.dim(), ndim = (int64_t)normalized_shape.size();
  if (ndim < 1 || dim < ndim || !input.sizes().slice(dim - ndim).equals(normalized_shape)) return false;
  // Weight and bias share one dtype: the input's, or float beside a 16-bit input.
  std::optional<at::ScalarType> affine;
  for (const auto* t : {&weight, &bias}) {
    if (!defined(*t)) continue;
    const auto type = (*t)->scalar_type();
    if (type != affine.value_or(type) || !(type == dtype || (half && type == at::kFloat))) return false;
    if ((*t)->device() != input.device() || !(*t)->sizes().equals(normalized_shape)) return false;
    affine = type;
  }
  return true;
}

namespace {

// ---- shapes, for fake tensors and meta tensors ----

std::tuple<Tensor, Tensor, Tensor> layer_norm_meta(
    const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptTensor& weight, const OptTensor& bias, double) {
  c10::SymDimVector stats(input.sym_sizes());
  for (size_t i = stats.size() - normalized_shape.size(); i < stats.size(); ++i) stats[i] = 1;
  const auto options = input.options().dtype(at::toOpMathType(input.scalar_type()));
  return {
      at::empty_symint(input.sym_sizes(), input.options()), at::empty_symint(stats, options),
      at::empty_symint(stats, options)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_meta(
    const Tensor&, const Tensor& input, c10::SymIntArrayRef normalized_shape, const Tensor&, const Tensor&,
    const OptTensor& weight, const OptTensor& bias, std::array<bool, 3> output_mask) {
  const auto affine = [&](const OptTensor& t, bool wanted) {
    return wanted && defined(t) ? at::empty_symint(normalized_shape, t->options()) : Tensor();
  };
  return {
      output_mask[0] ? at::empty_symint(input.sym_sizes(), input.options()) : Tensor(), affine(weight, output_mask[1]),
      affine(bias, output_mask[2])};
}

// ---- autograd ----

struct LayerNorm : torch::autograd::Function<LayerNorm> {
  static torch::autograd::variable_list forward(
      torch::autograd::AutogradContext* ctx, const Tensor& input, c10::SymIntArrayRef normalized_shape,
      const OptTensor& weight, const OptTensor& bias, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, mean, rstd] = layer_norm(input, normalized_shape, weight, bias, eps);
    ctx->save_for_backward({input, weight.value_or(Tensor()), bias.value_or(Tensor()), mean, rstd});
    ctx->saved_data["ndim"] = (int64_t)normalized_shape.size();
    ctx->mark_non_differentiable({mean, rstd});
    ctx->set_materialize_grads(false);
    return {output, mean, rstd};
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads) {
    if (!grads[0].defined()) return {Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
    const auto saved = ctx->get_saved_variables();
    const auto &input = saved[0], &weight = saved[1], &bias = saved[2];
    const auto ndim = ctx->saved_data["ndim"].toInt();
    // Edges are counted over the tensors that were given.
    const size_t edge_bias = 1 + weight.defined();
    const std::array<bool, 3> mask = {
        ctx->needs_input_grad(0), weight.defined() && ctx->needs_input_grad(1),
        bias.defined() && ctx->needs_input_grad(edge_bias)};
    auto [grad_input, grad_weight, grad_bias] = layer_norm_backward(
        grads[0], input, input.sym_sizes().slice(input.dim() - ndim), saved[3], saved[4], weight, bias, mask);
    return {grad_input, Tensor(), grad_weight, grad_bias, Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor> layer_norm_autograd(
    const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptTensor& weight, const OptTensor& bias,
    double eps) {
  if (!any_needs_grad(input, weight, bias)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return layer_norm(input, normalized_shape, weight, bias, eps);
  }
  auto out = LayerNorm::apply(input, normalized_shape, weight, bias, eps);
  return {out[0], out[1], out[2]};
}

// The gradient of the gradient is ATen's: its backward is differentiable to any order. It takes the statistics in
// the type of the weight, or of the input.
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_autograd(
    const Tensor& grad_out, const Tensor& input, c10::SymIntArrayRef normalized_shape, const Tensor& mean,
    const Tensor& rstd, const OptTensor& weight, const OptTensor& bias, std::array<bool, 3> output_mask) {
  if (!any_needs_grad(grad_out, input, weight)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return layer_norm_backward(grad_out, input, normalized_shape, mean, rstd, weight, bias, output_mask);
  }
  const auto type = (defined(weight) ? *weight : defined(bias) ? *bias : input).scalar_type();
  return at::native_layer_norm_backward_symint(
      grad_out, input, normalized_shape, mean.to(type), rstd.to(type), weight, bias, output_mask);
}

// ---- autocast: float32 on CUDA, as torch lists layer_norm there; not listed on a CPU ----

std::tuple<Tensor, Tensor, Tensor> layer_norm_autocast_cuda(
    const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptTensor& weight, const OptTensor& bias,
    double eps) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCUDA);
  const auto cast = [](const auto& t) { return at::autocast::cached_cast(at::kFloat, t, at::kCUDA); };
  return layer_norm(cast(input), normalized_shape, cast(weight), cast(bias), eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, Meta, m) {
  m.impl("layer_norm", layer_norm_meta);
  m.impl("layer_norm_backward", layer_norm_backward_meta);
}
TORCH_LIBRARY_IMPL(nnfast, Autograd, m) {
  m.impl("layer_norm", layer_norm_autograd);
  m.impl("layer_norm_backward", layer_norm_backward_autograd);
}
TORCH_LIBRARY_IMPL(nnfast, AutocastCUDA, m) { m.impl("layer_norm", layer_norm_autocast_cuda); }

}  // namespace nnfast
