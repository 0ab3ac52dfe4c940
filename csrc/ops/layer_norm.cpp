// The contract of LayerNorm: schema, which calls are covered, shapes, autograd, autocast.
#include <ATen/OpMathType.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/layer_norm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <torch/library.h>

#include "autograd.h"
#include "op.h"

namespace nnfast {

TORCH_LIBRARY_FRAGMENT(nnfast, m) {
  // stats: (2, rows), the mean and the reciprocal standard deviation of each row, in float (double for float64 input).
  // dtype: of the output; float is possible beside a 16-bit input, as autocast wants it. grad_out then has that dtype
  // too, and grad_input is rounded to the input's once.
  m.def(
      "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, *,"
      " ScalarType? dtype=None)"
      " -> (Tensor output, Tensor stats)");
  m.def(
      "layer_norm_backward(Tensor grad_out, Tensor input, SymInt[] normalized_shape, Tensor stats, Tensor? weight,"
      " Tensor? bias, bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

std::tuple<Tensor, Tensor> layer_norm(
    const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptTensor& weight, const OptTensor& bias,
    double eps, std::optional<at::ScalarType> dtype) {
  static const auto op = find_op<decltype(layer_norm)>("layer_norm");
  return op.call(input, normalized_shape, weight, bias, eps, dtype);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& grad_out, const Tensor& input, c10::SymIntArrayRef normalized_shape, const Tensor& stats,
    const OptTensor& weight, const OptTensor& bias, std::array<bool, 3> output_mask) {
  static const auto op = find_op<decltype(layer_norm_backward)>("layer_norm_backward");
  return op.call(grad_out, input, normalized_shape, stats, weight, bias, output_mask);
}

bool covers_layer_norm(
    const Tensor& input, at::IntArrayRef normalized_shape, const OptTensor& weight, const OptTensor& bias,
    std::optional<at::ScalarType> out) {
  const auto dtype = input.scalar_type();
  const bool half = half_dtype(dtype);
  const bool wide = out && *out != dtype;
  if (wide && !(half && *out == at::kFloat)) return false;
  if (!half && dtype != at::kFloat && (dtype != at::kDouble || !input.is_cpu())) return false;
  const auto dim = input.dim(), ndim = (int64_t)normalized_shape.size();
  if (ndim < 1 || dim < ndim || !input.sizes().slice(dim - ndim).equals(normalized_shape)) return false;
  // Weight and bias share one dtype: the input's, or float beside a 16-bit input. On a GPU torch allows that only where
  // autocast brings all to float.
  const bool beside = half && (wide || input.is_cpu() || at::autocast::is_autocast_enabled(input.device().type()));
  std::optional<at::ScalarType> affine;
  for (const auto* t : {&weight, &bias}) {
    if (!defined(*t)) continue;
    const auto type = (*t)->scalar_type();
    if (type != affine.value_or(type) || !((type == dtype && !wide) || (beside && type == at::kFloat))) return false;
    if ((*t)->device() != input.device() || !(*t)->sizes().equals(normalized_shape)) return false;
    affine = type;
  }
  return true;
}

std::pair<int64_t, int64_t> check_layer_norm(
    const Tensor& input, at::IntArrayRef normalized_shape, const OptTensor& weight, const OptTensor& bias,
    std::optional<at::ScalarType> dtype, bool kernels) {
  const auto extents =
      at::native::_check_layer_norm_inputs(input, normalized_shape, weight.value_or(Tensor()), bias.value_or(Tensor()));
  check_covered(kernels && covers_layer_norm(input, normalized_shape, weight, bias, dtype), "layer_norm");
  return extents;
}

std::optional<at::ScalarType> float_beside(const Tensor& input, const Tensor& output) {
  const bool wide = half_dtype(input.scalar_type()) && output.scalar_type() == at::kFloat;
  return wide ? std::optional(at::kFloat) : std::nullopt;
}

void check_layer_norm_backward(
    const Tensor& grad_out, const Tensor& input, c10::SymIntArrayRef normalized_shape, const Tensor& stats) {
  const auto fits = [&](const char* name, const Tensor& t, c10::SymIntArrayRef sizes, at::ScalarType dtype) {
    TORCH_CHECK(
        t.sym_sizes().equals(sizes) && t.scalar_type() == dtype && t.device() == input.device(),
        "nnfast::layer_norm_backward: expected ", name, " of size ", sizes, ", ", dtype, " on ", input.device(),
        ", but got ", t.sym_sizes(), ", ", t.scalar_type(), " on ", t.device());
  };
  const auto dtype = input.scalar_type();
  fits("grad_out", grad_out, input.sym_sizes(), float_beside(input, grad_out).value_or(dtype));
  const auto rows = c10::multiply_integers(input.sym_sizes().slice(0, input.dim() - normalized_shape.size()));
  fits("stats", stats, {2, rows}, at::toOpMathType(dtype));
}

namespace {

// ---- shapes, for fake tensors and meta tensors ----

std::tuple<Tensor, Tensor> layer_norm_meta(
    const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptTensor&, const OptTensor&, double,
    std::optional<at::ScalarType> dtype) {
  const auto outer = input.sym_sizes().slice(0, input.dim() - normalized_shape.size());
  return {
      at::empty_symint(input.sym_sizes(), input.options().dtype(dtype.value_or(input.scalar_type()))),
      at::empty_symint(
          {2, c10::multiply_integers(outer)}, input.options().dtype(at::toOpMathType(input.scalar_type())))};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_meta(
    const Tensor&, const Tensor& input, c10::SymIntArrayRef normalized_shape, const Tensor&, const OptTensor& weight,
    const OptTensor& bias, std::array<bool, 3> output_mask) {
  const auto affine = [&](const OptTensor& t, bool wanted) {
    return wanted && defined(t) ? at::empty_symint(normalized_shape, t->options()) : Tensor();
  };
  return {
      output_mask[0] ? at::empty_symint(input.sym_sizes(), input.options()) : Tensor(), affine(weight, output_mask[1]),
      affine(bias, output_mask[2])};
}

// ---- in ATen ----

// Differentiable to any order. ATen's takes the statistics one tensor each, of the input's rank, in the type of the
// weight or of the input, and reads them as dense.
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_aten(
    const Tensor& grad_out, const Tensor& input, c10::SymIntArrayRef normalized_shape, const Tensor& stats,
    const OptTensor& weight, const OptTensor& bias, std::array<bool, 3> output_mask) {
  check_layer_norm_backward(grad_out, input, normalized_shape, stats);
  const Tensor x = input.to(grad_out.scalar_type());
  c10::SymDimVector shape(input.sym_sizes());
  for (size_t i = shape.size() - normalized_shape.size(); i < shape.size(); ++i) shape[i] = 1;
  const auto affine = (defined(weight) ? *weight : defined(bias) ? *bias : x).scalar_type();
  const auto stat = [&](int64_t k) { return stats.select(0, k).to(affine).contiguous().view_symint(shape); };
  auto grads =
      at::native_layer_norm_backward_symint(grad_out, x, normalized_shape, stat(0), stat(1), weight, bias, output_mask);
  if (output_mask[0]) std::get<0>(grads) = std::get<0>(grads).to(input.scalar_type());
  return grads;
}

// ---- autograd ----

// normalized_shape is that of weight or bias and, without either, told by how many rows the statistics have.
c10::SymIntArrayRef normalized_shape_of(
    const Tensor& input, const Tensor& stats, const Tensor& weight, const Tensor& bias) {
  if (weight.defined()) return weight.sym_sizes();
  if (bias.defined()) return bias.sym_sizes();
  const auto sizes = input.sym_sizes();
  size_t outer = 0;
  for (c10::SymInt rows = 1; outer + 1 < sizes.size() && rows != stats.sym_size(1); ++outer) rows = rows * sizes[outer];
  return sizes.slice(outer);
}

struct LayerNorm {
  static constexpr auto name = "LayerNormBackward";
  static constexpr bool is_traceable = false;

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &input = saved[0], &stats = saved[1], &weight = saved[2], &bias = saved[3];
    if (!grads[0].defined()) return variable_list(3);
    const BackwardWay way(grads[0], input);
    auto [grad_input, grad_weight, grad_bias] = way.choose(layer_norm_backward, layer_norm_backward_aten)(
        grads[0], input, normalized_shape_of(input, stats, weight, bias), stats, weight, bias,
        {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)});
    return {grad_input, grad_weight, grad_bias};
  }
};

std::tuple<Tensor, Tensor> layer_norm_autograd(
    const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptTensor& weight, const OptTensor& bias,
    double eps, std::optional<at::ScalarType> dtype) {
  const auto forward = [&] { return below_autograd(layer_norm, input, normalized_shape, weight, bias, eps, dtype); };
  if (!any_needs_grad(input, weight, bias)) return forward();
  const auto node = make_node<LayerNorm>(input, weight, bias);
  auto out = forward();
  // torch would save what autocast made of the input, so the input itself may be changed in place.
  const bool cast = dtype.value_or(input.scalar_type()) != input.scalar_type();
  record(
      node, std::get<0>(out),
      {cast ? input.clone() : input, std::get<1>(out), weight.value_or(Tensor()), bias.value_or(Tensor())});
  return out;
}

// The gradient of the gradient is ATen's.
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_autograd(
    const Tensor& grad_out, const Tensor& input, c10::SymIntArrayRef normalized_shape, const Tensor& stats,
    const OptTensor& weight, const OptTensor& bias, std::array<bool, 3> output_mask) {
  if (any_needs_grad(grad_out, input, weight) || has_tangent(grad_out))
    return layer_norm_backward_aten(grad_out, input, normalized_shape, stats, weight, bias, output_mask);
  return below_autograd(layer_norm_backward, grad_out, input, normalized_shape, stats, weight, bias, output_mask);
}

// ---- autocast: float32 on CUDA, as torch lists layer_norm there; not listed on a CPU ----
//
// The kernel reads the input as it is and writes float32: 6 bytes an element where a cast and a LayerNorm move 14.

std::tuple<Tensor, Tensor> layer_norm_autocast_cuda(
    const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptTensor& weight, const OptTensor& bias,
    double eps, std::optional<at::ScalarType> dtype) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCUDA);
  const auto cast = [](const auto& t) { return at::autocast::cached_cast(at::kFloat, t, at::kCUDA); };
  if (half_dtype(input.scalar_type())) dtype = at::kFloat;
  return layer_norm(input, normalized_shape, cast(weight), cast(bias), eps, dtype);
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
