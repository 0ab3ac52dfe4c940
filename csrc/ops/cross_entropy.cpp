// The contract of cross-entropy: schema, which calls are covered, shapes, autograd, autocast. On a CPU.
#include <ATen/OpMathType.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Reduction.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/nll_loss.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "autograd.h"
#include "op.h"
#include "optimizer.h"

namespace nnfast {

TORCH_LIBRARY_FRAGMENT(nnfast, m) {
  // aten::cross_entropy_loss for a target of class indices. dtype: of the output, as if the input were brought to it
  // first. stats: (2, rows), each row's maximum and sum of exp(x - maximum), in float (double for float64).
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight=None, int reduction=1, int ignore_index=-100,"
      " float label_smoothing=0.0, *, ScalarType? dtype=None) -> (Tensor output, Tensor stats)");
  // check_input: raise where the input is seen to be another than that of the stats.
  m.def(
      "cross_entropy_backward(Tensor grad_out, Tensor input, Tensor stats, Tensor target, Tensor? weight,"
      " int reduction, int ignore_index, float label_smoothing, *, bool check_input=False) -> Tensor");
  // The same, and the input is overwritten by its gradient: no memory is taken for it.
  m.def(
      "cross_entropy_backward_(Tensor grad_out, Tensor(a!) input, Tensor stats, Tensor target, Tensor? weight,"
      " int reduction, int ignore_index, float label_smoothing, *, bool check_input=False) -> ()");
  // The cross-entropy of input linear_weight^T + linear_bias, of which a block of rows exists at a time. Where
  // output_mask asks for them, also the gradients of a loss that is reduced, for a grad_out of 1.
  m.def(
      "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias=None,"
      " Tensor? weight=None, int reduction=1, int ignore_index=-100, float label_smoothing=0.0, *,"
      " ScalarType? dtype=None, bool[3] output_mask=[False, False, False])"
      " -> (Tensor output, Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)");
  m.def(
      "linear_cross_entropy_backward(Tensor grad_out, Tensor input, Tensor linear_weight, Tensor target,"
      " Tensor? linear_bias, Tensor? weight, int reduction, int ignore_index, float label_smoothing,"
      " bool[3] output_mask) -> (Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)");
}

std::tuple<Tensor, Tensor> cross_entropy(
    const Tensor& input, const Tensor& target, const OptTensor& weight, int64_t reduction, int64_t ignore_index,
    double label_smoothing, std::optional<at::ScalarType> dtype) {
  static const auto op = find_op<decltype(cross_entropy)>("cross_entropy");
  return op.call(input, target, weight, reduction, ignore_index, label_smoothing, dtype);
}

Tensor cross_entropy_backward(
    const Tensor& grad_out, const Tensor& input, const Tensor& stats, const Tensor& target, const OptTensor& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing, bool check_input) {
  static const auto op = find_op<decltype(cross_entropy_backward)>("cross_entropy_backward");
  return op.call(grad_out, input, stats, target, weight, reduction, ignore_index, label_smoothing, check_input);
}

void cross_entropy_backward_(
    const Tensor& grad_out, const Tensor& input, const Tensor& stats, const Tensor& target, const OptTensor& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing, bool check_input) {
  static const auto op = find_op<decltype(cross_entropy_backward_)>("cross_entropy_backward_");
  op.call(grad_out, input, stats, target, weight, reduction, ignore_index, label_smoothing, check_input);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target, const OptTensor& linear_bias,
    const OptTensor& weight, int64_t reduction, int64_t ignore_index, double label_smoothing,
    std::optional<at::ScalarType> dtype, std::array<bool, 3> output_mask) {
  static const auto op = find_op<decltype(linear_cross_entropy)>("linear_cross_entropy");
  return op.call(
      input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, dtype, output_mask);
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(
    const Tensor& grad_out, const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const OptTensor& linear_bias, const OptTensor& weight, int64_t reduction, int64_t ignore_index,
    double label_smoothing, std::array<bool, 3> output_mask) {
  static const auto op = find_op<decltype(linear_cross_entropy_backward)>("linear_cross_entropy_backward");
  return op.call(
      grad_out, input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing,
      output_mask);
}

std::optional<double> total_weight(
    const Tensor& target, const OptTensor& weight, int64_t classes, int64_t ignore_index) {
  const Tensor rows = target.contiguous(), w = defined(weight) ? weight->to(at::kDouble).contiguous() : Tensor();
  const double* const weights = w.defined() ? w.const_data_ptr<double>() : nullptr;
  const int64_t *y = rows.const_data_ptr<int64_t>(), *const end = y + rows.numel();
  double total = 0;
  for (; y < end; ++y) {
    if (*y == ignore_index) continue;
    if (*y < 0 || *y >= classes) return std::nullopt;
    total += weights ? weights[*y] : 1.0;
  }
  return total;
}

void check_classes(const Tensor& target, int64_t classes, int64_t ignore_index) {
  if (!target.is_cpu() || target.scalar_type() != at::kLong) return;
  const Tensor rows = target.contiguous();
  for (const int64_t y : at::IntArrayRef(rows.const_data_ptr<int64_t>(), rows.numel()))
    if (y != ignore_index && (y < 0 || y >= classes))
      at::nll_loss(at::zeros({1, classes}), at::full({1}, y, at::kLong));
}

namespace {

// The checks that need no logits, which linear_cross_entropy shares: `type` is their dtype, `out` the loss's.
bool covers_classes(
    const Tensor& target, const OptTensor& weight, int64_t classes, int64_t ignore_index, double label_smoothing,
    at::ScalarType type, std::optional<at::ScalarType> out) {
  if (!target.is_cpu() || target.scalar_type() != at::kLong || !(label_smoothing >= 0 && label_smoothing <= 1))
    return false;
  // The loss is of the logits' dtype, or float for 16-bit logits; the weight is of the loss's, or autocast will bring
  // it there. It leaves float64 alone.
  const auto loss = out.value_or(type);
  if (loss != type && (loss != at::kFloat || type == at::kDouble)) return false;
  if (defined(weight)) {
    // Torch knows no gradient of the weight.
    if (!weight->is_cpu() || weight->dim() != 1 || weight->size(0) != classes || any_needs_grad(*weight)) return false;
    const bool cast = at::autocast::is_autocast_enabled(at::kCPU) && float_or_half(loss);
    if (weight->scalar_type() != loss && !(cast && float_or_half(weight->scalar_type()))) return false;
  }
  return total_weight(target, std::nullopt, classes, ignore_index).has_value();
}

}  // namespace

bool covers_cross_entropy(
    const Tensor& input, const Tensor& target, const OptTensor& weight, int64_t ignore_index, double label_smoothing,
    std::optional<at::ScalarType> dtype) {
  const int64_t dim = input.dim();
  if (!input.is_cpu() || !known_dtype(input.scalar_type()) || dim < 1 || input.size(class_dim(input)) == 0)
    return false;
  if (target.dim() != dim - 1) return false;
  for (int64_t d = 0; d < dim - 1; ++d)
    if (target.size(d) != input.size(d == 0 ? 0 : d + 1)) return false;
  const int64_t classes = input.size(class_dim(input));
  // Where the logits of an element lie apart, as in planes of an image, torch serves: its kernel reads across them.
  if (dim > 2 && classes != 1 && input.stride(1) != 1) return false;
  return covers_classes(target, weight, classes, ignore_index, label_smoothing, input.scalar_type(), dtype);
}

bool covers_linear_cross_entropy(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target, const OptTensor& linear_bias,
    const OptTensor& weight, int64_t ignore_index, double label_smoothing, std::optional<at::ScalarType> dtype) {
  if (!input.is_cpu() || !linear_weight.is_cpu() || (defined(linear_bias) && !linear_bias->is_cpu())) return false;
  if (input.dim() != 2 || linear_weight.dim() != 2 || input.size(1) != linear_weight.size(1)) return false;
  const int64_t classes = linear_weight.size(0);
  if (input.size(1) == 0 || classes == 0 || target.dim() != 1 || target.size(0) != input.size(0)) return false;
  if (defined(linear_bias) && (linear_bias->dim() != 1 || linear_bias->size(0) != classes)) return false;
  // One dtype, or any that autocast will bring to one.
  const auto all = [&](const auto& f) {
    return f(input.scalar_type()) && f(linear_weight.scalar_type()) &&
           (!defined(linear_bias) || f(linear_bias->scalar_type()));
  };
  auto type = input.scalar_type();
  if (at::autocast::is_autocast_enabled(at::kCPU) && all(float_or_half)) {
    type = at::autocast::get_autocast_dtype(at::kCPU);
    dtype = at::kFloat;
  } else if (!all([&](at::ScalarType t) { return known_dtype(t) && t == type; }))
    return false;
  return covers_classes(target, weight, classes, ignore_index, label_smoothing, type, dtype);
}

namespace {

// ---- shapes, for fake tensors and meta tensors ----

std::tuple<Tensor, Tensor> cross_entropy_meta(
    const Tensor& input, const Tensor& target, const OptTensor&, int64_t reduction, int64_t, double,
    std::optional<at::ScalarType> dtype) {
  const auto options = input.options().dtype(dtype.value_or(input.scalar_type()));
  return {
      reduction == at::Reduction::None ? at::empty_symint(target.sym_sizes(), options) : at::empty({}, options),
      at::empty_symint({2, target.sym_numel()}, input.options().dtype(at::toOpMathType(input.scalar_type())))};
}

Tensor cross_entropy_backward_meta(
    const Tensor&, const Tensor& input, const Tensor&, const Tensor&, const OptTensor&, int64_t, int64_t, double,
    bool) {
  c10::SymDimVector sizes(input.sym_sizes());
  std::rotate(sizes.begin() + class_dim(input), sizes.begin() + class_dim(input) + 1, sizes.end());
  return at::empty_symint(sizes, input.options()).movedim(-1, class_dim(input));
}

void cross_entropy_backward_meta_(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptTensor&, int64_t, int64_t, double, bool) {}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward_meta(
    const Tensor&, const Tensor& input, const Tensor& linear_weight, const Tensor&, const OptTensor&, const OptTensor&,
    int64_t, int64_t, double, std::array<bool, 3> output_mask) {
  const auto like = [&](bool wanted, c10::SymIntArrayRef sizes) {
    return wanted ? at::empty_symint(sizes, input.options()) : Tensor();
  };
  return {
      like(output_mask[0], input.sym_sizes()), like(output_mask[1], linear_weight.sym_sizes()),
      like(output_mask[2], linear_weight.sym_sizes().slice(0, 1))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_meta(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target, const OptTensor&, const OptTensor&,
    int64_t reduction, int64_t, double, std::optional<at::ScalarType> dtype, std::array<bool, 3> output_mask) {
  const auto options = input.options().dtype(dtype.value_or(input.scalar_type()));
  const Tensor output =
      at::empty_symint(reduction == at::Reduction::None ? target.sym_sizes() : c10::SymIntArrayRef(), options);
  return std::tuple_cat(
      std::make_tuple(output),
      linear_cross_entropy_backward_meta(output, input, linear_weight, target, {}, {}, reduction, 0, 0, output_mask));
}

// ---- in ATen, and so differentiable ----

// g (softmax sum_c q_c - q), q_c = ((1 - e) [c = y] + e / C) w_c, over the total weight where it is a mean.
Tensor cross_entropy_backward_aten(
    const Tensor& grad_out, const Tensor& input, const Tensor&, const Tensor& target, const OptTensor& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing, bool) {
  const Tensor x = input.movedim(class_dim(input), -1).to(grad_out.scalar_type());
  const auto classes = x.sym_size(-1);
  const Tensor valid = target.ne(ignore_index), y = target.masked_fill(valid.logical_not(), 0).unsqueeze(-1);
  const Tensor w = (defined(weight) ? *weight : at::ones_symint({classes}, x.options())).to(x.scalar_type());
  const Tensor is_y = at::arange(classes, y.options()).eq(y);
  Tensor q = (is_y * (1 - label_smoothing) + label_smoothing / (double)classes.guard_int(__FILE__, __LINE__)) * w;
  q = q * valid.unsqueeze(-1);
  if (reduction == at::Reduction::Mean) q = q / (is_y * w * valid.unsqueeze(-1)).sum();
  const Tensor g = reduction == at::Reduction::None ? grad_out.unsqueeze(-1) : grad_out;
  return ((x.softmax(-1) * q.sum(-1, true) - q) * g).to(input.scalar_type()).movedim(-1, class_dim(input));
}

// Computes the logits once more.
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward_aten(
    const Tensor& grad_out, const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const OptTensor& linear_bias, const OptTensor& weight, int64_t reduction, int64_t ignore_index,
    double label_smoothing, std::array<bool, 3> output_mask) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Tensor logits = at::linear(input, linear_weight, linear_bias);
  const Tensor d = cross_entropy_backward_aten(
      grad_out, logits, Tensor(), target, weight, reduction, ignore_index, label_smoothing, false);
  return {
      output_mask[0] ? d.matmul(linear_weight) : Tensor(), output_mask[1] ? d.t().matmul(input) : Tensor(),
      output_mask[2] ? d.sum(0) : Tensor()};
}

// ---- autograd ----

// Whether there is one reference to t. The object that Python knew it by holds another, and lives as long as t does.
bool held_once(const at::TensorBase& t) {
  const auto holders = t.use_count();
  return holders == 1 || (holders == 2 && t.unsafeGetTensorImpl()->pyobj_slot()->has_unique_reference());
}

// Whether nobody can see the memory of t any more, t being the last reference to it. A view keeps its base alive.
bool seen_by_nobody_else(const Tensor& t) {
  const auto holders = t.storage().use_count();
  return held_once(t) && (holders == 1 || (holders == 2 && t.is_view() && held_once(t._base())));
}

// What a node keeps beside tensors.
struct Options {
  int64_t reduction, ignore_index;
  double label_smoothing;

  void keep(AutogradContext& ctx) const {
    ctx.saved_data["reduction"] = reduction;
    ctx.saved_data["ignore_index"] = ignore_index;
    ctx.saved_data["label_smoothing"] = label_smoothing;
  }
  static Options of(AutogradContext& ctx) {
    return {
        ctx.saved_data["reduction"].toInt(), ctx.saved_data["ignore_index"].toInt(),
        ctx.saved_data["label_smoothing"].toDouble()};
  }
};

struct CrossEntropy {
  static constexpr auto name = "CrossEntropyBackward";
  static constexpr bool is_traceable = false;

  // torch keeps the logarithms of the probabilities, and whoever holds the logits may change them. We keep the logits,
  // and see in most cases that they were changed. What a hook of saved tensors gives instead has another storage and
  // may be less exact: nothing is compared then. (An address may be that of freed logits once more.)
  struct Node : OpNode<CrossEntropy> {
    std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> logits;

    bool kept(const Tensor& t) const { return logits && logits->lock().get() == t.storage().unsafeGetStorageImpl(); }
  };

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto* const last = last_backward<CrossEntropy>(ctx);
    const auto saved = ctx->get_saved_variables();
    if (!grads[0].defined()) return {Tensor()};
    const BackwardWay way(grads[0], saved[0]);
    const auto [reduction, ignore_index, label_smoothing] = Options::of(*ctx);
    // What is being traced, or batched, has readers that are not known yet. A storage that cannot be resized is memory
    // that somebody else brought, such as numpy.
    const bool may_overwrite = last && way.unseen() && ordinary(saved[0]) && saved[0].is_contiguous() &&
                               saved[0].storage().resizable() && saved[0].dim() <= 2;
    const auto* const node = running_node<Node>();
    const bool check_input = node && ordinary(saved[0]) && node->kept(saved[0]);
    const auto call = [&](const auto& f) {
      return f(grads[0], saved[0], saved[1], saved[2], saved[3], reduction, ignore_index, label_smoothing, check_input);
    };
    if (!may_overwrite) return {call(way.choose(cross_entropy_backward, cross_entropy_backward_aten))};
    // The logits make room for their gradient where nobody else can see them. If memory runs out before anything was
    // written, the node gets back what it had saved.
    let_go(*last);
    try {
      if (!seen_by_nobody_else(saved[0])) return {call(cross_entropy_backward)};
      call(cross_entropy_backward_);
      return {saved[0].detach()};
    } catch (...) {
      put_back(*last, saved);
      throw;
    }
  }
};

std::tuple<Tensor, Tensor> cross_entropy_autograd(
    const Tensor& input, const Tensor& target, const OptTensor& weight, int64_t reduction, int64_t ignore_index,
    double label_smoothing, std::optional<at::ScalarType> dtype) {
  const auto forward = [&] {
    return below_autograd(cross_entropy, input, target, weight, reduction, ignore_index, label_smoothing, dtype);
  };
  if (!any_needs_grad(input)) return forward();
  const auto node = make_node<CrossEntropy, CrossEntropy::Node>(input);
  auto out = forward();
  if (ordinary(input)) node->logits = input.storage().getWeakStorageImpl();
  Options{reduction, ignore_index, label_smoothing}.keep(node->ctx_);
  record(node, std::get<0>(out), {input, std::get<1>(out), target, weight.value_or(Tensor())});
  return out;
}

Tensor cross_entropy_backward_autograd(
    const Tensor& grad_out, const Tensor& input, const Tensor& stats, const Tensor& target, const OptTensor& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing, bool check_input) {
  if (any_needs_grad(grad_out, input) || has_tangent(grad_out))
    return cross_entropy_backward_aten(
        grad_out, input, stats, target, weight, reduction, ignore_index, label_smoothing, check_input);
  return below_autograd(
      cross_entropy_backward, grad_out, input, stats, target, weight, reduction, ignore_index, label_smoothing,
      check_input);
}

struct LinearCrossEntropy {
  static constexpr auto name = "LinearCrossEntropyBackward";
  static constexpr bool is_traceable = false;

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto* const last = last_backward<LinearCrossEntropy>(ctx);
    auto saved = ctx->get_saved_variables();
    const Tensor& grad_out = grads[0];
    if (!grad_out.defined()) return variable_list(3);
    const BackwardWay way(grad_out, saved[0]);
    const auto [reduction, ignore_index, label_smoothing] = Options::of(*ctx);
    const std::array<bool, 3> mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)};
    const bool there = saved[5].defined() || saved[6].defined() || saved[7].defined();
    if (way.recorded() || !there) {
      const auto backward = way.choose(linear_cross_entropy_backward, linear_cross_entropy_backward_aten);
      auto [grad_input, grad_weight, grad_bias] = backward(
          grad_out, saved[0], saved[1], saved[2], saved[3], saved[4], reduction, ignore_index, label_smoothing, mask);
      return {grad_input, grad_weight, grad_bias};
    }
    // They were computed for a grad_out of 1. The last backward may scale them in place, but for those that somebody
    // else holds too, such as a hook that packed them: of these it returns copies.
    variable_list out(saved.begin() + 5, saved.end());
    // grad_out is of float beside gradients in 16 bits, and is not rounded to them: every element would be off alike.
    const auto scaled = [&](const Tensor& grad) { return grad.defined() ? grad * grad_out : grad; };
    if (!last || !way.unseen()) {
      for (Tensor& grad : out) grad = scaled(grad);
      return out;
    }
    const double factor = grad_out.item<double>();
    let_go(*last);
    saved.resize(5);
    std::vector<bool> alone;
    for (const Tensor& grad : out) alone.push_back(!grad.defined() || (covers_clip(grad) && seen_by_nobody_else(grad)));
    variable_list copies(3);
    try {
      for (int i = 0; i < 3; ++i)
        if (!alone[i]) copies[i] = factor == 1 ? out[i].clone() : scaled(out[i]);
    } catch (...) {
      saved.insert(saved.end(), out.begin(), out.end());
      put_back(*last, saved);
      throw;
    }
    for (int i = 0; i < 3; ++i) {
      if (!out[i].defined()) continue;
      out[i] = alone[i] ? out[i].detach() : copies[i];
      if (alone[i] && factor != 1) scale_(out[i], factor);  // takes no tensor's memory, which could run out
    }
    return out;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_autograd(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target, const OptTensor& linear_bias,
    const OptTensor& weight, int64_t reduction, int64_t ignore_index, double label_smoothing,
    std::optional<at::ScalarType> dtype, std::array<bool, 3> output_mask) {
  const bool differentiable = any_needs_grad(input, linear_weight, linear_bias);
  // The gradient is computed here, while the logits exist, but for where grad_out is needed first: without a reduction
  // each row has its own, and in float16 it brings the loss's scale, without which the gradient would become zero.
  if (differentiable && reduction != at::Reduction::None && input.scalar_type() != at::kHalf)
    output_mask = {any_needs_grad(input), any_needs_grad(linear_weight), any_needs_grad(linear_bias)};
  const auto forward = [&] {
    return below_autograd(
        linear_cross_entropy, input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
        label_smoothing, dtype, output_mask);
  };
  if (!differentiable) return forward();
  const auto node = make_node<LinearCrossEntropy>(input, linear_weight, linear_bias);
  auto [output, grad_input, grad_weight, grad_bias] = forward();
  Options{reduction, ignore_index, label_smoothing}.keep(node->ctx_);
  record(
      node, output,
      {input, linear_weight, target, linear_bias.value_or(Tensor()), weight.value_or(Tensor()), grad_input, grad_weight,
       grad_bias});
  return {output, Tensor(), Tensor(), Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward_autograd(
    const Tensor& grad_out, const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const OptTensor& linear_bias, const OptTensor& weight, int64_t reduction, int64_t ignore_index,
    double label_smoothing, std::array<bool, 3> output_mask) {
  if (any_needs_grad(grad_out, input, linear_weight, linear_bias) || has_tangent(grad_out))
    return linear_cross_entropy_backward_aten(
        grad_out, input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing,
        output_mask);
  return below_autograd(
      linear_cross_entropy_backward, grad_out, input, linear_weight, target, linear_bias, weight, reduction,
      ignore_index, label_smoothing, output_mask);
}

// ---- autocast: float, as torch lists cross_entropy_loss on a CPU; the copy in float is never made ----

std::tuple<Tensor, Tensor> cross_entropy_autocast(
    const Tensor& input, const Tensor& target, const OptTensor& weight, int64_t reduction, int64_t ignore_index,
    double label_smoothing, std::optional<at::ScalarType> dtype) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCPU);
  return cross_entropy(
      input, target, at::autocast::cached_cast(at::kFloat, weight, at::kCPU), reduction, ignore_index, label_smoothing,
      half_dtype(input.scalar_type()) ? at::kFloat : dtype);
}

// linear in the lower precision, and then as above.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_autocast(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target, const OptTensor& linear_bias,
    const OptTensor& weight, int64_t reduction, int64_t ignore_index, double label_smoothing,
    std::optional<at::ScalarType> dtype, std::array<bool, 3> output_mask) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCPU);
  const auto type = at::autocast::get_autocast_dtype(at::kCPU);
  const auto cast = [](const auto& t) { return autocast_to_lower(t, at::kCPU); };
  const Tensor x = cast(input);
  return linear_cross_entropy(
      x, cast(linear_weight), target, cast(linear_bias), at::autocast::cached_cast(at::kFloat, weight, at::kCPU),
      reduction, ignore_index, label_smoothing, x.scalar_type() == type ? at::kFloat : dtype, output_mask);
}

// torch's fallback for these views looks for the changed tensor among what the op returns, which is nothing.
void cross_entropy_backward_negative_(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptTensor&, int64_t, int64_t, double, bool) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "nnfast::cross_entropy_backward_ takes no tensor with a negative bit");
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, Negative, m) { m.impl("cross_entropy_backward_", cross_entropy_backward_negative_); }
TORCH_LIBRARY_IMPL(nnfast, Meta, m) {
  m.impl("cross_entropy", cross_entropy_meta);
  m.impl("cross_entropy_backward", cross_entropy_backward_meta);
  m.impl("cross_entropy_backward_", cross_entropy_backward_meta_);
  m.impl("linear_cross_entropy", linear_cross_entropy_meta);
  m.impl("linear_cross_entropy_backward", linear_cross_entropy_backward_meta);
}
TORCH_LIBRARY_IMPL(nnfast, Autograd, m) {
  m.impl("cross_entropy", cross_entropy_autograd);
  m.impl("cross_entropy_backward", cross_entropy_backward_autograd);
  m.impl("linear_cross_entropy", linear_cross_entropy_autograd);
  m.impl("linear_cross_entropy_backward", linear_cross_entropy_backward_autograd);
}
TORCH_LIBRARY_IMPL(nnfast, AutocastCPU, m) {
  m.impl("cross_entropy", cross_entropy_autocast);
  m.impl("linear_cross_entropy", linear_cross_entropy_autocast);
}

}  // namespace nnfast
