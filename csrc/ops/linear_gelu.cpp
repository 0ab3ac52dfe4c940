// The contract of Linear+GELU, and of GELU alone: schema, which calls are covered, shapes, autograd, autocast.
#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <torch/library.h>

#include "linear.h"
#include "paths.h"

namespace nnfast {

TORCH_LIBRARY_FRAGMENT(nnfast, m) {
  m.def("gelu(Tensor self, *, str approximate='none') -> Tensor");
  m.def("gelu_backward(Tensor grad_output, Tensor self, *, str approximate='none') -> Tensor");
  // The same, and its sums over all dimensions but the last: where self is a Linear's output, its bias's gradient.
  m.def(
      "gelu_backward_sum(Tensor grad_output, Tensor self, *, str approximate='none')"
      " -> (Tensor grad_input, Tensor grad_bias)");
  // The backward of linear(gelu(self), weight): what goes to the GELU, what the GELU makes of it, and the sums of that
  // over all dimensions but the last.
  m.def(
      "gelu_linear_backward(Tensor grad_output, Tensor weight, Tensor self, *, str approximate='none')"
      " -> (Tensor grad_gelu, Tensor grad_input, Tensor grad_bias)");
  // gelu(pre) and pre = input weight^T + bias, rounded to its dtype before the GELU as two calls of torch would. Where
  // pre is not wanted, it may be a tensor without elements.
  m.def(
      "linear_gelu(Tensor input, Tensor weight, Tensor? bias=None, *, str approximate='none', bool want_pre=True)"
      " -> (Tensor output, Tensor pre)");
}

Tensor gelu(const Tensor& self, c10::string_view approximate) {
  static const auto op = find_op<decltype(gelu)>("gelu");
  return op.call(self, approximate);
}

Tensor gelu_backward(const Tensor& grad_output, const Tensor& self, c10::string_view approximate) {
  static const auto op = find_op<decltype(gelu_backward)>("gelu_backward");
  return op.call(grad_output, self, approximate);
}

std::tuple<Tensor, Tensor> gelu_backward_sum(
    const Tensor& grad_output, const Tensor& self, c10::string_view approximate) {
  static const auto op = find_op<decltype(gelu_backward_sum)>("gelu_backward_sum");
  return op.call(grad_output, self, approximate);
}

c10::TypedOperatorHandle<decltype(gelu_linear_backward)> find_gelu_linear_backward() {
  static const auto op = find_op<decltype(gelu_linear_backward)>("gelu_linear_backward");
  return op;
}

std::tuple<Tensor, Tensor, Tensor> gelu_linear_backward(
    const Tensor& grad_output, const Tensor& weight, const Tensor& self, c10::string_view approximate) {
  return find_gelu_linear_backward().call(grad_output, weight, self, approximate);
}

bool has_gelu_linear_backward(const Tensor& t) {
  return find_gelu_linear_backward().hasKernelForDispatchKey(
      t.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA);
}

std::tuple<Tensor, Tensor> linear_gelu(
    const Tensor& input, const Tensor& weight, const OptTensor& bias, c10::string_view approximate, bool want_pre) {
  static const auto op = find_op<decltype(linear_gelu)>("linear_gelu");
  return op.call(input, weight, bias, approximate, want_pre);
}

bool covers_gelu(const Tensor& input, c10::string_view approximate) {
  if (input.scalar_type() == at::kDouble && !input.is_cpu()) return false;
  return known_dtype(input.scalar_type()) && (approximate == "none" || approximate == "tanh");
}

void check_gelu_backward(const Tensor& grad_output, const Tensor& self) {
  TORCH_CHECK(
      grad_output.sym_sizes() == self.sym_sizes() && grad_output.scalar_type() == self.scalar_type() &&
          grad_output.device() == self.device(),
      "gelu_backward: expected grad_output to be of self's shape, dtype and device, ", self.sym_sizes(), ", ",
      self.scalar_type(), " and ", self.device(), ", but got ", grad_output.sym_sizes(), ", ",
      grad_output.scalar_type(), " and ", grad_output.device());
}

void check_gelu_linear_backward(const Tensor& grad_output, const Tensor& weight, const Tensor& self) {
  const auto fits = [&](const Tensor& t) {
    return t.scalar_type() == self.scalar_type() && t.device() == self.device();
  };
  TORCH_CHECK(
      known_dtype(self.scalar_type()) && self.dim() >= 1 && weight.dim() == 2 && fits(weight) && fits(grad_output) &&
          grad_output.dim() == self.dim() && weight.sym_size(1) == self.sym_size(-1) &&
          weight.sym_size(0) == grad_output.sym_size(-1) &&
          grad_output.sym_sizes().slice(0, self.dim() - 1) == self.sym_sizes().slice(0, self.dim() - 1),
      "nnfast::gelu_linear_backward: the shapes, dtypes and devices of grad_output, weight and self must be those of a "
      "Linear that reads a GELU");
}

bool covers_linear_gelu(
    const Tensor& input, const Tensor& weight, const OptTensor& bias, c10::string_view approximate) {
  return covers_gelu(input, approximate) && covers_linear(input, weight, bias);
}

namespace {

Path found_ahead("gelu_backward.found_ahead");

// ---- shapes, for fake tensors and meta tensors ----

Tensor gelu_meta(const Tensor& self, c10::string_view) { return at::empty_like(self); }
Tensor gelu_backward_meta(const Tensor& grad_output, const Tensor& self, c10::string_view) {
  check_gelu_backward(grad_output, self);
  return at::empty_like(self);
}

std::tuple<Tensor, Tensor> gelu_backward_sum_meta(const Tensor& grad_output, const Tensor& self, c10::string_view) {
  check_gelu_backward(grad_output, self);
  return {at::empty_symint(self.sym_sizes(), self.options()), at::empty_symint({self.sym_size(-1)}, self.options())};
}

std::tuple<Tensor, Tensor, Tensor> gelu_linear_backward_meta(
    const Tensor& grad_output, const Tensor& weight, const Tensor& self, c10::string_view) {
  check_gelu_linear_backward(grad_output, weight, self);
  const auto like_self = [&] { return at::empty_symint(self.sym_sizes(), self.options()); };
  return {like_self(), like_self(), at::empty_symint({self.sym_size(-1)}, self.options())};
}

std::tuple<Tensor, Tensor> linear_gelu_meta(
    const Tensor& input, const Tensor& weight, const OptTensor&, c10::string_view, bool want_pre) {
  c10::SymDimVector sizes(input.sym_sizes());
  sizes.back() = weight.sym_size(0);
  const Tensor output = at::empty_symint(sizes, input.options());
  return {output, want_pre ? at::empty_symint(sizes, input.options()) : at::empty({0}, input.options())};
}

// ---- in ATen: on every other device, and where the gradient is itself differentiated, to any order ----

Tensor gelu_aten(const Tensor& self, c10::string_view approximate) { return at::gelu(self, approximate); }

Tensor gelu_backward_aten(const Tensor& grad_output, const Tensor& self, c10::string_view approximate) {
  check_gelu_backward(grad_output, self);
  return at::gelu_backward(grad_output, self, approximate);
}

std::tuple<Tensor, Tensor> gelu_backward_sum_aten(
    const Tensor& grad_output, const Tensor& self, c10::string_view approximate) {
  const Tensor grad = gelu_backward_aten(grad_output, self, approximate).contiguous();
  return {grad, grad.reshape_symint({-1, grad.sym_size(-1)}).sum(0)};
}

std::tuple<Tensor, Tensor, Tensor> gelu_linear_backward_aten(
    const Tensor& grad_output, const Tensor& weight, const Tensor& self, c10::string_view approximate) {
  check_gelu_linear_backward(grad_output, weight, self);
  const Tensor grad = grad_output.matmul(weight).contiguous();
  return std::tuple_cat(std::make_tuple(grad), gelu_backward_sum_aten(grad, self, approximate));
}

// ---- autograd ----

// A type for each approximation: a node then need not carry its name.
template <bool Tanh>
struct Gelu {
  static constexpr auto name = "GeluBackward";
  static constexpr bool is_traceable = false;

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto* const node = running_node<Node>();
    const Tensor input = node ? node->take_input() : ctx->get_saved_variables()[0];
    if (!grads[0].defined()) return {Tensor()};
    const auto approximate = Tanh ? "tanh" : "none";
    // A hook of saved tensors may have made another dtype of it, which torch's op takes.
    if (input.scalar_type() != grads[0].scalar_type()) return {at::gelu_backward(grads[0], input, approximate)};
    const BackwardWay way(grads[0], input);
    if (!node || !way.unseen())
      return {way.choose(nnfast::gelu_backward, gelu_backward_aten)(grads[0], input, approximate)};
    auto* const linear = linear_before(*node);
    auto ahead = node->grads.take(*node, grads[0]);
    if (!ahead && !linear) return {nnfast::gelu_backward(grads[0], input, approximate)};
    if (!ahead) {
      ahead.emplace();
      std::tie(ahead->input, ahead->sums) = gelu_backward_sum(grads[0], input, approximate);
    } else {
      found_ahead.taken();
    }
    if (linear) linear->sums.leave(ahead->input, ahead->sums);
    return {ahead->input};
  }

  class Node : public OpNode<Gelu>, public GeluNode {
   public:
    torch::autograd::Node& node() override { return *this; }
    c10::string_view approximate() const override { return Tanh ? "tanh" : "none"; }
    Tensor input() override {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!input_.defined()) input_ = this->ctx_.get_saved_variables()[0];
      return input_;
    }
    Tensor take_input() {
      const Tensor taken = input();
      const std::lock_guard<std::mutex> lock(mutex_);
      input_.reset();
      return taken;
    }
    void release_variables() override {
      this->grads.let_go();
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        input_.reset();
      }
      OpNode<Gelu>::release_variables();
    }

   private:
    std::mutex mutex_;
    Tensor input_;
  };

  // The Linear that the gradient goes to, where it wants its sums and nobody stands between.
  static LinearNode* linear_before(Node& node) {
    auto* const linear = dynamic_cast<LinearNode*>(node.next_edge(0).function.get());
    return linear && linear->wants_sums() && hands_on(node, *linear) ? linear : nullptr;
  }
};

// Records `output` as the GELU of self.
Tensor recorded_gelu(Tensor output, const Tensor& self, bool tanh) {
  const auto with = [&](const auto& node) { record(node, output, {self}); };
  tanh ? with(make_node<Gelu<true>, Gelu<true>::Node>(self)) : with(make_node<Gelu<false>, Gelu<false>::Node>(self));
  return output;
}

Tensor gelu_autograd(const Tensor& self, c10::string_view approximate) {
  const Tensor output = below_autograd(nnfast::gelu, self, approximate);
  return any_needs_grad(self) ? recorded_gelu(output, self, approximate == "tanh") : output;
}

// The gradient of the gradient is ATen's, which is differentiable to any order.
Tensor gelu_backward_autograd(const Tensor& grad_output, const Tensor& self, c10::string_view approximate) {
  if (any_needs_grad(grad_output, self) || has_tangent(grad_output))
    return at::gelu_backward(grad_output, self, approximate);
  return below_autograd(nnfast::gelu_backward, grad_output, self, approximate);
}

std::tuple<Tensor, Tensor> gelu_backward_sum_autograd(
    const Tensor& grad_output, const Tensor& self, c10::string_view approximate) {
  if (any_needs_grad(grad_output, self) || has_tangent(grad_output))
    return gelu_backward_sum_aten(grad_output, self, approximate);
  return below_autograd(gelu_backward_sum, grad_output, self, approximate);
}

std::tuple<Tensor, Tensor, Tensor> gelu_linear_backward_autograd(
    const Tensor& grad_output, const Tensor& weight, const Tensor& self, c10::string_view approximate) {
  if (any_needs_grad(grad_output, weight, self) || has_tangent(grad_output))
    return gelu_linear_backward_aten(grad_output, weight, self, approximate);
  return below_autograd(gelu_linear_backward, grad_output, weight, self, approximate);
}

// input, weight and bias as they are recorded, and what autocast made of them.
std::tuple<Tensor, Tensor> recorded_linear_gelu(
    const Tensor& input, const Tensor& weight, const OptTensor& bias, const Tensor& cast_input,
    const Tensor& cast_weight, const OptTensor& cast_bias, c10::string_view approximate, bool want_pre) {
  const bool recorded = any_needs_grad(input, weight, bias);
  auto [output, pre] =
      below_autograd(linear_gelu, cast_input, cast_weight, cast_bias, approximate, want_pre || recorded);
  if (recorded) {
    record_linear(pre, input, weight, bias, cast_input, cast_weight);
    output = recorded_gelu(std::move(output), pre, approximate == "tanh");
  }
  return {output, pre};
}

std::tuple<Tensor, Tensor> linear_gelu_autograd(
    const Tensor& input, const Tensor& weight, const OptTensor& bias, c10::string_view approximate, bool want_pre) {
  return recorded_linear_gelu(input, weight, bias, input, weight, bias, approximate, want_pre);
}

// ---- autocast: the lower precision, as torch lists linear; gelu is not listed. On a CPU as linear's ----

std::tuple<Tensor, Tensor> linear_gelu_autocast_cpu(
    const Tensor& input, const Tensor& weight, const OptTensor& bias, c10::string_view approximate, bool want_pre) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCPU);
  const auto cast = [](const auto& t) { return autocast_to_lower(t, at::kCPU); };
  return recorded_linear_gelu(input, weight, bias, cast(input), cast(weight), cast(bias), approximate, want_pre);
}

std::tuple<Tensor, Tensor> linear_gelu_autocast_cuda(
    const Tensor& input, const Tensor& weight, const OptTensor& bias, c10::string_view approximate, bool want_pre) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCUDA);
  const auto cast = [](const auto& t) { return autocast_to_lower(t, at::kCUDA); };
  return linear_gelu(cast(input), cast(weight), cast(bias), approximate, want_pre);
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CompositeExplicitAutograd, m) {
  m.impl("gelu", gelu_aten);
  m.impl("gelu_backward", gelu_backward_aten);
  m.impl("gelu_backward_sum", gelu_backward_sum_aten);
  m.impl("gelu_linear_backward", gelu_linear_backward_aten);
}
TORCH_LIBRARY_IMPL(nnfast, Meta, m) {
  m.impl("gelu_linear_backward", gelu_linear_backward_meta);
  m.impl("gelu", gelu_meta);
  m.impl("gelu_backward", gelu_backward_meta);
  m.impl("gelu_backward_sum", gelu_backward_sum_meta);
  m.impl("linear_gelu", linear_gelu_meta);
}
TORCH_LIBRARY_IMPL(nnfast, Autograd, m) {
  m.impl("gelu", gelu_autograd);
  m.impl("gelu_linear_backward", gelu_linear_backward_autograd);
  m.impl("gelu_backward", gelu_backward_autograd);
  m.impl("gelu_backward_sum", gelu_backward_sum_autograd);
  m.impl("linear_gelu", linear_gelu_autograd);
}
TORCH_LIBRARY_IMPL(nnfast, AutocastCPU, m) { m.impl("linear_gelu", linear_gelu_autocast_cpu); }
TORCH_LIBRARY_IMPL(nnfast, AutocastCUDA, m) { m.impl("linear_gelu", linear_gelu_autocast_cuda); }

}  // namespace nnfast
