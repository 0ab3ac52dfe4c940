// The contract of Linear: schema, which calls are covered, shapes, autograd, autocast.
#include "linear.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "paths.h"

namespace nnfast {

TORCH_LIBRARY_FRAGMENT(nnfast, m) {
  m.def("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor");
  // input is read for grad_weight alone, and weight for grad_input. grad_bias is what output_mask[2] asks for, bias or
  // not. grad_weight lies in memory as weight does, by rows or by columns. dtype: of grad_weight and grad_bias;
  // input_dtype: of grad_input. Float is possible beside 16 bits, where autocast cast them.
  m.def(
      "linear_backward(Tensor grad_out, Tensor? input, Tensor? weight, bool[3] output_mask, *, ScalarType? dtype=None,"
      " ScalarType? input_dtype=None) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

Tensor linear(const Tensor& input, const Tensor& weight, const OptTensor& bias) {
  static const auto op = find_op<decltype(linear)>("linear");
  return op.call(input, weight, bias);
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(
    const Tensor& grad_out, const OptTensor& input, const OptTensor& weight, std::array<bool, 3> output_mask,
    std::optional<at::ScalarType> dtype, std::optional<at::ScalarType> input_dtype) {
  static const auto op = find_op<decltype(linear_backward)>("linear_backward");
  return op.call(grad_out, input, weight, output_mask, dtype, input_dtype);
}

bool covers_linear(const Tensor& input, const Tensor& weight, const OptTensor& bias) {
  if (!known_dtype(input.scalar_type()) || weight.dim() != 2 || input.dim() < 1) return false;
  if (input.size(-1) != weight.size(1) || weight.device() != input.device()) return false;
  // Without features there is no telling rows from a number of elements.
  if (weight.numel() == 0) return false;
  if (defined(bias) && (bias->dim() != 1 || bias->size(0) != weight.size(0) || bias->device() != input.device()))
    return false;
  // One dtype, or any that autocast will bring to one: it leaves float64 alone.
  const auto same = [&](const Tensor& t) { return t.scalar_type() == input.scalar_type(); };
  if (same(weight) && (!defined(bias) || same(*bias))) return true;
  const auto cast = [&](const Tensor& t) { return float_or_half(t.scalar_type()); };
  return at::autocast::is_autocast_enabled(input.device().type()) && cast(input) && cast(weight) &&
         (!defined(bias) || cast(*bias));
}

void check_linear_backward(
    const Tensor& grad_out, const OptTensor& input, const OptTensor& weight, std::array<bool, 3> output_mask,
    std::optional<at::ScalarType> dtype, std::optional<at::ScalarType> input_dtype) {
  const auto fits = [&](const Tensor& t) {
    return t.scalar_type() == grad_out.scalar_type() && t.device() == grad_out.device();
  };
  const bool weight_fits = defined(weight) && weight->dim() == 2 && fits(*weight) && grad_out.dim() >= 1 &&
                           weight->sym_size(0) == grad_out.sym_size(-1);
  const bool input_fits =
      defined(input) && input->dim() >= 1 && fits(*input) && input->dim() == grad_out.dim() &&
      input->sym_sizes().slice(0, input->dim() - 1) == grad_out.sym_sizes().slice(0, grad_out.dim() - 1);
  TORCH_CHECK(
      known_dtype(grad_out.scalar_type()) && grad_out.dim() >= 1 && grad_out.sym_size(-1) > 0 &&
          (!output_mask[0] || weight_fits) && (!output_mask[1] || input_fits),
      "nnfast::linear_backward: the shapes, dtypes and devices of grad_out, input and weight must be those of a "
      "Linear's");
  for (const auto& asked : {dtype, input_dtype})
    TORCH_CHECK(
        !asked || *asked == grad_out.scalar_type() || (*asked == at::kFloat && grad_out.scalar_type() != at::kDouble),
        "nnfast::linear_backward: dtype must be grad_out's, or float beside 16 bits");
}

bool by_columns(const OptTensor& weight) {
  return defined(weight) && weight->is_non_overlapping_and_dense() && !weight->is_contiguous();
}

namespace {

// ---- shapes, for fake tensors and meta tensors ----

Tensor linear_meta(const Tensor& input, const Tensor& weight, const OptTensor&) {
  c10::SymDimVector sizes(input.sym_sizes());
  sizes.back() = weight.sym_size(0);
  return at::empty_symint(sizes, input.options());
}

std::tuple<Tensor, Tensor, Tensor> linear_backward_meta(
    const Tensor& grad_out, const OptTensor& input, const OptTensor& weight, std::array<bool, 3> output_mask,
    std::optional<at::ScalarType> dtype, std::optional<at::ScalarType> input_dtype) {
  check_linear_backward(grad_out, input, weight, output_mask, dtype, input_dtype);
  const auto options = [&](const auto& asked) {
    return grad_out.options().dtype(asked.value_or(grad_out.scalar_type()));
  };
  const auto wide = options(dtype);
  const c10::SymInt out = grad_out.sym_size(-1);
  Tensor grad_input, grad_weight, grad_bias;
  if (output_mask[0]) {
    c10::SymDimVector sizes(grad_out.sym_sizes());
    sizes.back() = weight->sym_size(1);
    grad_input = at::empty_symint(sizes, options(input_dtype));
  }
  if (output_mask[1]) {
    const c10::SymInt in = input->sym_size(-1);
    grad_weight = by_columns(weight) ? at::empty_symint({in, out}, wide).t() : at::empty_symint({out, in}, wide);
  }
  if (output_mask[2]) grad_bias = at::empty_symint({out}, wide);
  return {grad_input, grad_weight, grad_bias};
}

// ---- in ATen: on every other device, and where the gradient is itself differentiated, to any order ----

Tensor linear_aten(const Tensor& input, const Tensor& weight, const OptTensor& bias) {
  return at::linear(input, weight, bias);
}

std::tuple<Tensor, Tensor, Tensor> linear_backward_aten(
    const Tensor& grad_out, const OptTensor& input, const OptTensor& weight, std::array<bool, 3> output_mask,
    std::optional<at::ScalarType> dtype, std::optional<at::ScalarType> input_dtype) {
  check_linear_backward(grad_out, input, weight, output_mask, dtype, input_dtype);
  // A sparse gradient, which has no other shape than a matrix's here, cannot be reshaped.
  const auto rows = grad_out.dim() == 2 ? grad_out : grad_out.reshape_symint({-1, grad_out.sym_size(-1)});
  const auto type = dtype.value_or(grad_out.scalar_type());
  Tensor grad_input, grad_weight, grad_bias;
  if (output_mask[0]) grad_input = grad_out.matmul(*weight).to(input_dtype.value_or(grad_out.scalar_type()));
  if (output_mask[1]) {
    const Tensor x = input->reshape_symint({-1, input->sym_size(-1)});
    grad_weight = (by_columns(weight) ? x.t().matmul(rows).t() : rows.t().matmul(x)).to(type);
  }
  if (output_mask[2]) grad_bias = rows.sum(0, false, type);
  return {grad_input, grad_weight, grad_bias};
}

// ---- autograd ----

Path sums_found("linear_backward.sums_found"), worked_ahead("linear_backward.gelu_worked_ahead");

Tensor linear_autograd(const Tensor& input, const Tensor& weight, const OptTensor& bias) {
  const Tensor output = below_autograd(nnfast::linear, input, weight, bias);
  if (any_needs_grad(input, weight, bias))
    record_linear(output, input, weight, bias, input, weight, at::isReducedFloatingType(input.scalar_type()));
  return output;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward_autograd(
    const Tensor& grad_out, const OptTensor& input, const OptTensor& weight, std::array<bool, 3> output_mask,
    std::optional<at::ScalarType> dtype, std::optional<at::ScalarType> input_dtype) {
  if (any_needs_grad(grad_out, input, weight) || has_tangent(grad_out))
    return linear_backward_aten(grad_out, input, weight, output_mask, dtype, input_dtype);
  return below_autograd(nnfast::linear_backward, grad_out, input, weight, output_mask, dtype, input_dtype);
}

// ---- autocast: the lower precision, as torch lists linear ----
//
// On a CPU the casts are no steps of the graph: the backward makes the gradients in the dtype of what was cast, with no
// copy in 16 bits in between.

Tensor linear_autocast_cpu(const Tensor& input, const Tensor& weight, const OptTensor& bias) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCPU);
  const auto x = autocast_to_lower(input, at::kCPU), w = autocast_to_lower(weight, at::kCPU);
  const auto b = autocast_to_lower(bias, at::kCPU);
  const Tensor output = below_autograd(nnfast::linear, x, w, b);
  if (any_needs_grad(input, weight, bias)) record_linear(output, input, weight, bias, x, w);
  return output;
}

Tensor linear_autocast_cuda(const Tensor& input, const Tensor& weight, const OptTensor& bias) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCUDA);
  const auto cast = [&](const auto& t) { return autocast_to_lower(t, at::kCUDA); };
  return nnfast::linear(cast(input), cast(weight), cast(bias));
}

// Float where the node that this edge leads to takes a gradient in float: a cast from 16 bits is then saved. Else none.
std::optional<at::ScalarType> wider_asked(const LinearNode* node, size_t edge, const Tensor& grad) {
  if (!node || !node->next_edge(edge).is_valid() || grad.scalar_type() == at::kDouble || !grad.is_cpu())
    return std::nullopt;
  const auto& to = node->next_edge(edge);
  const auto asked = to.function->input_metadata(to.input_nr).options().dtype().toScalarType();
  return asked == at::kFloat ? std::optional(asked) : std::nullopt;
}

// Whether this backward will run `node`, and not just look at what comes to it.
bool will_run(torch::autograd::Node& node) {
  const auto* const tasks = torch::autograd::get_current_graph_task_exec_info();
  if (!tasks || tasks->empty()) return true;
  const auto found = tasks->find(&node);
  return found != tasks->end() && found->second.needed_;
}

// The GELU whose output the Linear reads, where one kernel makes both grad_input and what the GELU's backward gives.
GeluNode* gelu_before(LinearNode& linear, const Tensor& grad) {
  if (!linear.works_ahead || !has_gelu_linear_backward(grad)) return nullptr;
  auto* const gelu = dynamic_cast<GeluNode*>(linear.next_edge(LinearNode::kInput).function.get());
  return gelu && hands_on(linear, gelu->node()) && will_run(gelu->node()) ? gelu : nullptr;
}

}  // namespace

variable_list Linear::backward(AutogradContext* ctx, const variable_list& grads) {
  auto* const last = last_backward<Linear>(ctx);
  constexpr std::array edges = {LinearNode::kInput, LinearNode::kWeight, LinearNode::kBias};
  std::array<bool, 3> mask;
  for (size_t i = 0; i < 3; ++i) mask[i] = ctx->needs_input_grad(edges[i]);
  // For a bias alone nothing is saved, and a second backward finds nothing missing.
  auto* const self = running_node<LinearNode>();
  const bool any =
      !self || self->should_compute_output(LinearNode::kInput) || self->should_compute_output(LinearNode::kWeight);
  auto saved = any ? ctx->get_saved_variables() : variable_list(2);
  TORCH_CHECK(saved.size() == 2, torch::autograd::ERR_BACKWARD_TWICE);
  if (!grads[0].defined()) return variable_list(3);
  const Tensor& kept = saved[0].defined() ? saved[0] : saved[1];
  auto* const node = BackwardWay(grads[0], kept).unseen() ? self : nullptr;
  auto* const gelu = node && mask[0] ? gelu_before(*node, grads[0]) : nullptr;
  const Tensor pre = gelu ? gelu->input() : Tensor();
  const BackwardWay way(grads[0], kept);  // after gelu->input(), which may run any code
  Tensor sums, before;
  if (node && mask[2]) sums = node->sums.take(*node, grads[0]).value_or(Tensor());
  if (sums.defined()) {
    sums_found.taken();
    mask[2] = false;
  }
  if (gelu) mask[0] = false;
  const auto asked = [&](size_t i) { return mask[i] ? wider_asked(node, edges[i], grads[0]) : std::nullopt; };
  auto [grad_input, grad_weight, grad_bias] = way.choose(nnfast::linear_backward, linear_backward_aten)(
      grads[0], saved[0], saved[1], mask, asked(mask[1] ? 1 : 2), asked(0));
  if (gelu) {
    // The GELU's output goes first, so that no more is held than torch's own two backwards hold. There is then no
    // second try, as there is none of torch's Linear where its GELU's backward fails.
    if (last) {
      saved[0] = Tensor();
      let_go(*last);
    }
    GeluNode::Grads ahead;
    std::tie(before, ahead.input, ahead.sums) = gelu_linear_backward(grads[0], saved[1], pre, gelu->approximate());
    gelu->grads.leave(before, std::move(ahead));
    worked_ahead.taken();
  }
  return {sums.defined() ? sums : grad_bias, gelu ? before : grad_input, grad_weight};
}

void record_linear(
    const Tensor& output, const Tensor& input, const Tensor& weight, const OptTensor& bias, const Tensor& cast_input,
    const Tensor& cast_weight, bool works_ahead) {
  const auto node = make_node<Linear, LinearNode>(bias, input, weight);
  node->works_ahead = works_ahead;
  // torch saves views: of the weight, and of an input that it makes a matrix of.
  const auto viewed = [](const Tensor& t, bool is) {
    return is && ordinary(t) && !t.is_inference() ? view_to_save(t) : t;
  };
  // Each is kept for the other's gradient alone.
  record(
      node, output,
      {needs_grad(weight) ? viewed(cast_input, cast_input.is_same(input) && input.dim() != 2) : Tensor(),
       needs_grad(input) ? viewed(cast_weight, cast_weight.is_same(weight)) : Tensor()});
}

TORCH_LIBRARY_IMPL(nnfast, CompositeExplicitAutograd, m) {
  m.impl("linear", linear_aten);
  m.impl("linear_backward", linear_backward_aten);
}
TORCH_LIBRARY_IMPL(nnfast, Meta, m) {
  m.impl("linear", linear_meta);
  m.impl("linear_backward", linear_backward_meta);
}
TORCH_LIBRARY_IMPL(nnfast, Autograd, m) {
  m.impl("linear", linear_autograd);
  m.impl("linear_backward", linear_backward_autograd);
}
TORCH_LIBRARY_IMPL(nnfast, AutocastCPU, m) { m.impl("linear", linear_autocast_cpu); }
TORCH_LIBRARY_IMPL(nnfast, AutocastCUDA, m) { m.impl("linear", linear_autocast_cuda); }

}  // namespace nnfast
