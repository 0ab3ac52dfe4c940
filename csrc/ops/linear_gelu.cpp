// The contract of Linear+GELU, and of GELU alone: schema, which calls are covered, shapes, autograd, autocast.
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu_backward.h>
#include <torch/library.h>

#include "../gate/autograd.h"
#include "op.h"

namespace nnfast {

TORCH_LIBRARY_FRAGMENT(nnfast, m) {
  m.def("gelu(Tensor self, *, str approximate='none') -> Tensor");
  m.def("gelu_backward(Tensor grad_output, Tensor self, *, str approximate='none') -> Tensor");
  // gelu(pre) and pre = input weight^T + bias, rounded to its dtype before the GELU as two calls of torch would.
  m.def(
      "linear_gelu(Tensor input, Tensor weight, Tensor? bias=None, *, str approximate='none')"
      " -> (Tensor output, Tensor pre)");
  // grad_bias is what output_mask[2] asks for, bias or not.
  m.def(
      "linear_gelu_backward(Tensor grad_out, Tensor input, Tensor weight, Tensor pre, *, str approximate='none',"
      " bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  // The same, and pre may be overwritten: no memory is then taken for its gradient.
  m.def(
      "linear_gelu_backward_(Tensor grad_out, Tensor input, Tensor weight, Tensor(a!) pre, *, str approximate='none',"
      " bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

Tensor gelu(const Tensor& self, c10::string_view approximate) {
  static const auto op = find_op<decltype(gelu)>("gelu");
  return op.call(self, approximate);
}

Tensor gelu_backward(const Tensor& grad_output, const Tensor& self, c10::string_view approximate) {
  static const auto op = find_op<decltype(gelu_backward)>("gelu_backward");
  return op.call(grad_output, self, approximate);
}

std::tuple<Tensor, Tensor> linear_gelu(
    const Tensor& input, const Tensor& weight, const OptTensor& bias, c10::string_view approximate) {
  static const auto op = find_op<decltype(linear_gelu)>("linear_gelu");
  return op.call(input, weight, bias, approximate);
}

std::tuple<Tensor, Tensor, Tensor> linear_gelu_backward(
    const Tensor& grad_out, const Tensor& input, const Tensor& weight, const Tensor& pre, c10::string_view approximate,
    std::array<bool, 3> output_mask) {
  static const auto op = find_op<decltype(linear_gelu_backward)>("linear_gelu_backward");
  return op.call(grad_out, input, weight, pre, approximate, output_mask);
}

std::tuple<Tensor, Tensor, Tensor> linear_gelu_backward_(
    const Tensor& grad_out, const Tensor& input, const Tensor& weight, const Tensor& pre, c10::string_view approximate,
    std::array<bool, 3> output_mask) {
  static const auto op = find_op<decltype(linear_gelu_backward_)>("linear_gelu_backward_");
  return op.call(grad_out, input, weight, pre, approximate, output_mask);
}

bool covers_gelu(const Tensor& input, c10::string_view approximate) {
  if (input.scalar_type() == at::kDouble && !input.is_cpu()) return false;
  return known_dtype(input.scalar_type()) && (approximate == "none" || approximate == "tanh");
}

bool covers_linear_gelu(
    const Tensor& input, const Tensor& weight, const OptTensor& bias, c10::string_view approximate) {
  if (!covers_gelu(input, approximate) || weight.dim() != 2 || input.dim() < 1) return false;
  if (input.size(-1) != weight.size(1) || weight.device() != input.device()) return false;
  // Without features there is no telling rows from a number of elements.
  if (weight.numel() == 0) return false;
  if (defined(bias) && (bias->dim() != 1 || bias->size(0) != weight.size(0) || bias->device() != input.device()))
    return false;
  // One dtype, or any that autocast will bring to one: it leaves float64 alone.
  const auto same = [&](const Tensor& t) { return t.scalar_type() == input.scalar_type(); };
  if (same(weight) && (!defined(bias) || same(*bias))) return true;
  const auto cast = [&](const Tensor& t) { return known_dtype(t.scalar_type()) && t.scalar_type() != at::kDouble; };
  return at::autocast::is_autocast_enabled(input.device().type()) && cast(input) && cast(weight) &&
         (!defined(bias) || cast(*bias));
}

namespace {

// ---- shapes, for fake tensors and meta tensors ----

Tensor gelu_meta(const Tensor& self, c10::string_view) { return at::empty_like(self); }
Tensor gelu_backward_meta(const Tensor&, const Tensor& self, c10::string_view) { return at::empty_like(self); }

std::tuple<Tensor, Tensor> linear_gelu_meta(
    const Tensor& input, const Tensor& weight, const OptTensor&, c10::string_view) {
  c10::SymDimVector sizes(input.sym_sizes());
  sizes.back() = weight.sym_size(0);
  return {at::empty_symint(sizes, input.options()), at::empty_symint(sizes, input.options())};
}

std::tuple<Tensor, Tensor, Tensor> linear_gelu_backward_meta(
    const Tensor&, const Tensor& input, const Tensor& weight, const Tensor&, c10::string_view,
    std::array<bool, 3> output_mask) {
  const auto like = [&](bool wanted, c10::SymIntArrayRef sizes) {
    return wanted ? at::empty_symint(sizes, input.options()) : Tensor();
  };
  return {
      like(output_mask[0], input.sym_sizes()), like(output_mask[1], weight.sym_sizes()),
      like(output_mask[2], weight.sym_sizes().slice(0, 1))};
}

// ---- autograd ----

// A type for each approximation: a node then need not carry its name.
template <bool Tanh>
struct Gelu {
  static constexpr auto name = "GeluBackward";
  static constexpr bool is_traceable = false;

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const NotRecorded guard;
    if (!grads[0].defined()) return {Tensor()};
    return {nnfast::gelu_backward(grads[0], saved[0], Tanh ? "tanh" : "none")};
  }
};

Tensor gelu_autograd(const Tensor& self, c10::string_view approximate) {
  const auto forward = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return nnfast::gelu(self, approximate);
  };
  if (!any_needs_grad(self)) return forward();
  const auto recorded = [&](const auto& node) {
    auto output = forward();
    record(node, output, {self});
    return output;
  };
  return approximate == "tanh" ? recorded(make_node<Gelu<true>>(self)) : recorded(make_node<Gelu<false>>(self));
}

// The gradient of the gradient is ATen's, which is differentiable to any order.
Tensor gelu_backward_autograd(const Tensor& grad_output, const Tensor& self, c10::string_view approximate) {
  if (any_needs_grad(grad_output, self)) return at::gelu_backward(grad_output, self, approximate);
  at::AutoDispatchBelowADInplaceOrView guard;
  return nnfast::gelu_backward(grad_output, self, approximate);
}

// The gradients of input weight^T + bias for grad, added to out; differentiable.
void add_linear_backward(
    variable_list& out, const Tensor& grad, const Tensor& input, const Tensor& weight, std::array<bool, 3> mask) {
  const auto add = [](Tensor& to, const Tensor& t) {
    if (t.defined()) to = to.defined() ? to + t : t;
  };
  const auto [grad_input, grad_weight, grad_bias] = nnfast::linear_backward(grad, input, weight, mask);
  add(out[0], grad_input), add(out[1], grad_weight), add(out[2], grad_bias);
}

template <bool Tanh>
struct LinearGelu {
  static constexpr auto name = "LinearGeluBackward";
  static constexpr bool is_traceable = false;

  // The second output, pre, has a gradient like any other: through it the second derivative reaches the inputs.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto* const last = last_backward<LinearGelu>(ctx);
    const auto saved = ctx->get_saved_variables();
    if (last) let_go(*last);
    const NotRecorded guard;
    const auto &input = saved[0], &weight = saved[1], &pre = saved[2];
    // Torch's own graph frees the pre-activation before the products are taken; here its memory takes its gradient.
    const bool overwrite = last && !at::GradMode::is_enabled() && !grads[1].defined() && held_by_nobody_else(pre);
    const auto linear_gelu_backward = overwrite ? nnfast::linear_gelu_backward_ : nnfast::linear_gelu_backward;
    const std::array<bool, 3> mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)};
    variable_list out(3);
    if (grads[0].defined())
      std::tie(out[0], out[1], out[2]) =
          linear_gelu_backward(grads[0], input, weight, pre, Tanh ? "tanh" : "none", mask);
    if (grads[1].defined()) add_linear_backward(out, grads[1], input, weight, mask);
    return out;
  }
};

std::tuple<Tensor, Tensor> linear_gelu_autograd(
    const Tensor& input, const Tensor& weight, const OptTensor& bias, c10::string_view approximate) {
  const auto forward = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return linear_gelu(input, weight, bias, approximate);
  };
  if (!any_needs_grad(input, weight, bias)) return forward();
  const auto recorded = [&](const auto& node) {
    auto out = forward();
    record(node, {std::get<0>(out), std::get<1>(out)}, {input, weight, std::get<1>(out)});
    return out;
  };
  return approximate == "tanh" ? recorded(make_node<LinearGelu<true>>(input, weight, bias))
                               : recorded(make_node<LinearGelu<false>>(input, weight, bias));
}

std::tuple<Tensor, Tensor, Tensor> linear_gelu_backward_autograd(
    const Tensor& grad_out, const Tensor& input, const Tensor& weight, const Tensor& pre, c10::string_view approximate,
    std::array<bool, 3> output_mask) {
  if (!any_needs_grad(grad_out, input, weight, pre)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return linear_gelu_backward(grad_out, input, weight, pre, approximate, output_mask);
  }
  variable_list out(3);
  add_linear_backward(out, at::gelu_backward(grad_out, pre, approximate), input, weight, output_mask);
  return {out[0], out[1], out[2]};
}

// ---- autocast: the lower precision, as torch lists linear; gelu is not listed ----

template <c10::DeviceType device, c10::DispatchKey key>
std::tuple<Tensor, Tensor> linear_gelu_autocast(
    const Tensor& input, const Tensor& weight, const OptTensor& bias, c10::string_view approximate) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto type = at::autocast::get_lower_precision_fp_from_device_type(device);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(type, t, device); };
  return linear_gelu(cast(input), cast(weight), cast(bias), approximate);
}

}  // namespace

// Where a backend has no way to overwrite pre.
TORCH_LIBRARY_IMPL(nnfast, CompositeExplicitAutograd, m) { m.impl("linear_gelu_backward_", linear_gelu_backward); }
TORCH_LIBRARY_IMPL(nnfast, Meta, m) {
  m.impl("gelu", gelu_meta);
  m.impl("gelu_backward", gelu_backward_meta);
  m.impl("linear_gelu", linear_gelu_meta);
  m.impl("linear_gelu_backward", linear_gelu_backward_meta);
}
TORCH_LIBRARY_IMPL(nnfast, Autograd, m) {
  m.impl("gelu", gelu_autograd);
  m.impl("gelu_backward", gelu_backward_autograd);
  m.impl("linear_gelu", linear_gelu_autograd);
  m.impl("linear_gelu_backward", linear_gelu_backward_autograd);
}
TORCH_LIBRARY_IMPL(nnfast, AutocastCPU, m) {
  m.impl("linear_gelu", linear_gelu_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}
TORCH_LIBRARY_IMPL(nnfast, AutocastCUDA, m) {
  m.impl("linear_gelu", linear_gelu_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace nnfast
