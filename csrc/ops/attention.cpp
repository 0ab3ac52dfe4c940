// The contract of scaled dot product attention: schema, which calls are covered, shapes, autograd, autocast.
#include <ATen/Context.h>
#include <ATen/ExpandUtils.h>
#include <ATen/OpMathType.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/softmax.h>
#include <torch/library.h>

#include <cmath>

#include "autograd.h"
#include "op.h"

namespace nnfast {

TORCH_LIBRARY_FRAGMENT(nnfast, m) {
  // The heads of keys must divide those of queries: a group of query heads then reads each. stats: (2, batch, heads,
  // queries) in float, the largest score and 1 / the sum of the exponentials (csrc/cpu/kernels.h).
  m.def(
      "scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None,"
      " bool is_causal=False, *, float? scale=None) -> (Tensor output, Tensor stats)");
  m.def(
      "scaled_dot_product_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value,"
      " Tensor? attn_mask, Tensor output, Tensor stats, bool is_causal, *, float? scale=None, bool[3] output_mask)"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}

std::tuple<Tensor, Tensor> scaled_dot_product_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptTensor& attn_mask, bool is_causal,
    std::optional<double> scale) {
  static const auto op = find_op<decltype(scaled_dot_product_attention)>("scaled_dot_product_attention");
  return op.call(query, key, value, attn_mask, is_causal, scale);
}

std::tuple<Tensor, Tensor, Tensor> scaled_dot_product_attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const OptTensor& attn_mask,
    const Tensor& output, const Tensor& stats, bool is_causal, std::optional<double> scale,
    std::array<bool, 3> output_mask) {
  static const auto op =
      find_op<decltype(scaled_dot_product_attention_backward)>("scaled_dot_product_attention_backward");
  return op.call(grad_out, query, key, value, attn_mask, output, stats, is_causal, scale, output_mask);
}

namespace {

// Whether torch's own fused kernel takes the call: the output then lies as the query does. Any other call torch makes
// up of several ops, whose output is contiguous.
bool torch_fuses(const Tensor& query, const Tensor& key, const Tensor& value, const OptTensor& attn_mask) {
  for (const auto* t : {&query, &key, &value})
    if (t->sym_stride(3) != 1) return false;
  return query.sym_size(3) == value.sym_size(3) && (!defined(attn_mask) || attn_mask->dim() != 3);
}

}  // namespace

bool covers_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptTensor& attn_mask, bool is_causal) {
  const auto device = query.device();
  if (!query.is_cpu() || key.device() != device || value.device() != device) return false;
  const auto dtype = query.scalar_type();
  // One dtype, or any that autocast will bring to one.
  const bool cast = at::autocast::is_autocast_enabled(at::kCPU);
  for (const auto* t : {&query, &key, &value})
    if (!float_or_half(t->scalar_type()) || !(cast || t->scalar_type() == dtype) || t->dim() != 4 || t->numel() == 0)
      return false;
  if (key.size(0) != query.size(0) || value.size(0) != query.size(0)) return false;
  if (key.size(1) != value.size(1) || query.size(1) % key.size(1) != 0) return false;
  if (key.size(2) != value.size(2) || key.size(3) != query.size(3)) return false;
  if (defined(attn_mask)) {
    const auto& mask = *attn_mask;
    const auto type = mask.scalar_type();
    if (!(type == at::kBool || type == at::kFloat || (float_or_half(type) && (cast || type == dtype)))) return false;
    if (is_causal || mask.requires_grad() || mask.device() != device || mask.dim() < 2 || mask.dim() > 4) return false;
    const int64_t sizes[] = {query.size(0), query.size(1), query.size(2), key.size(2)};
    for (int64_t d = 1; d <= mask.dim(); ++d)
      if (mask.size(-d) != 1 && mask.size(-d) != sizes[4 - d]) return false;
  }
  return true;
}

bool allowed_attention(const Tensor& query, const Tensor& key, const Tensor& value, const OptTensor& attn_mask) {
  const auto& context = at::globalContext();
  return context.userEnabledFlashSDP() && (torch_fuses(query, key, value, attn_mask) || context.userEnabledMathSDP());
}

std::optional<std::vector<int64_t>> attention_strides(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptTensor& attn_mask) {
  if (query.is_contiguous() || !torch_fuses(query, key, value, attn_mask)) return std::nullopt;
  if (query.is_non_overlapping_and_dense()) return query.strides().vec();
  return at::infer_dense_strides(query.sizes(), query.strides());
}

void check_attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& value, const Tensor& output, const Tensor& stats) {
  auto sizes = query.sizes().vec();
  TORCH_CHECK(
      stats.scalar_type() == at::kFloat && stats.sizes().equals({2, sizes[0], sizes[1], sizes[2]}),
      "stats are not those of the forward");
  sizes[3] = value.size(3);
  for (const auto* t : {&grad_out, &output})
    TORCH_CHECK(
        t->sizes().equals(sizes) && t->scalar_type() == query.scalar_type() && t->device() == query.device(),
        "output and its gradient are not those of the forward");
}

namespace {

// ---- shapes, for fake tensors and meta tensors ----

std::tuple<Tensor, Tensor> attention_meta(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptTensor& attn_mask, bool,
    std::optional<double>) {
  c10::SymDimVector sizes(query.sym_sizes());
  sizes[3] = value.sym_size(3);
  return {
      torch_fuses(query, key, value, attn_mask) ? at::empty_like(query) : at::empty_symint(sizes, query.options()),
      at::empty_symint(
          {2, query.sym_size(0), query.sym_size(1), query.sym_size(2)}, query.options().dtype(at::kFloat))};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_meta(
    const Tensor&, const Tensor& query, const Tensor& key, const Tensor& value, const OptTensor&, const Tensor&,
    const Tensor&, bool, std::optional<double>, std::array<bool, 3> output_mask) {
  const auto like = [](bool wanted, const Tensor& t) {
    if (!wanted) return Tensor();
    return at::empty_symint({t.sym_size(0), t.sym_size(2), t.sym_size(1), t.sym_size(3)}, t.options()).transpose(1, 2);
  };
  return {like(output_mask[0], query), like(output_mask[1], key), like(output_mask[2], value)};
}

// ---- in ATen ----

// Differentiable to any order: the formula, of queries, keys and values alone, of 16 bits in float.
std::tuple<Tensor, Tensor, Tensor> attention_backward_aten(
    const Tensor& of_output, const Tensor& queries, const Tensor& keys, const Tensor& values,
    const OptTensor& attn_mask, const Tensor&, const Tensor&, bool is_causal, std::optional<double> scale,
    std::array<bool, 3> output_mask) {
  const auto dtype = queries.scalar_type(), wide = at::toOpMathType(dtype);
  const Tensor grad_out = of_output.to(wide), query = queries.to(wide), key = keys.to(wide), value = values.to(wide);
  const int64_t group = query.size(1) / key.size(1);
  const double factor = scale.value_or(1 / std::sqrt((double)query.size(3)));
  const auto grouped = [&](const Tensor& t) { return group == 1 ? t : t.repeat_interleave(group, 1); };
  const auto summed = [&](const Tensor& t) { return group == 1 ? t : t.unflatten(1, {-1, group}).sum(2); };
  const Tensor k = grouped(key), v = grouped(value);
  Tensor scores = query.matmul(k.transpose(-2, -1)) * factor;
  Tensor hidden;
  if (is_causal) hidden = at::ones({query.size(2), key.size(2)}, query.options().dtype(at::kBool)).tril().logical_not();
  if (defined(attn_mask)) {
    if (attn_mask->scalar_type() != at::kBool) scores = scores + attn_mask->to(scores.scalar_type());
    hidden = attn_mask->scalar_type() == at::kBool ? attn_mask->logical_not() : scores.detach().isneginf();
  }
  // A query that sees no key has no probabilities, where softmax would have NaN.
  if (hidden.defined()) scores = scores.masked_fill(hidden.logical_and(hidden.all(-1, true).logical_not()), -INFINITY);
  Tensor p = scores.softmax(-1);
  if (hidden.defined()) p = p.masked_fill(hidden.all(-1, true), 0);
  const Tensor grad_p = grad_out.matmul(v.transpose(-2, -1));
  const Tensor grad_scores = p * (grad_p - (grad_p * p).sum(-1, true)) * factor;
  return {
      output_mask[0] ? grad_scores.matmul(k).to(dtype) : Tensor(),
      output_mask[1] ? summed(grad_scores.transpose(-2, -1).matmul(query)).to(dtype) : Tensor(),
      output_mask[2] ? summed(p.transpose(-2, -1).matmul(grad_out)).to(dtype) : Tensor()};
}

// ---- autograd ----

struct ScaledDotProductAttention {
  static constexpr auto name = "ScaledDotProductAttentionBackward";
  static constexpr bool is_traceable = false;

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    if (!grads[0].defined()) return variable_list(3);
    const auto& mask = saved[3];
    const BackwardWay way(grads[0], saved[0]);
    const auto backward = way.choose(scaled_dot_product_attention_backward, attention_backward_aten);
    auto [grad_query, grad_key, grad_value] = backward(
        grads[0], saved[0], saved[1], saved[2], mask.defined() ? OptTensor(mask) : std::nullopt, saved[4], saved[5],
        ctx->saved_data["is_causal"].toBool(), ctx->saved_data["scale"].toOptional<double>(),
        {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)});
    return {grad_query, grad_key, grad_value};
  }
};

// What is kept of a mask. Torch makes numbers of a boolean one, so that whoever owns it may change it afterwards, for
// the next layer say: it is copied, but once where it is broadcast. `copied`: in any case.
Tensor kept(const OptTensor& mask, bool copied) {
  if (!defined(mask)) return Tensor();
  if (!(copied || mask->scalar_type() == at::kBool) || !ordinary(*mask)) return *mask;
  Tensor once = *mask;
  for (int64_t d = 0; d < mask->dim(); ++d)
    if (mask->stride(d) == 0) once = once.narrow(d, 0, 1);
  return once.clone().expand(mask->sizes());
}

std::tuple<Tensor, Tensor> attention_autograd(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptTensor& attn_mask, bool is_causal,
    std::optional<double> scale) {
  Tensor mask;
  const bool recorded = any_needs_grad(query, key, value);
  // Where torch makes the call up of several ops, these keep products of all but the value: the rest may be changed.
  const bool copied = recorded && !torch_fuses(query, key, value, attn_mask);
  const auto saved = [&](const Tensor& t) { return copied ? t.clone() : t; };
  const auto forward = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (recorded) mask = kept(attn_mask, copied);
    return scaled_dot_product_attention(query, key, value, attn_mask, is_causal, scale);
  };
  if (!recorded) return forward();
  const auto node = make_node<ScaledDotProductAttention>(query, key, value);
  node->ctx_.saved_data["is_causal"] = is_causal;
  node->ctx_.saved_data["scale"] = scale;
  auto out = forward();
  record(node, std::get<0>(out), {saved(query), saved(key), value, mask, saved(std::get<0>(out)), std::get<1>(out)});
  return out;
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_autograd(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const OptTensor& attn_mask,
    const Tensor& output, const Tensor& stats, bool is_causal, std::optional<double> scale,
    std::array<bool, 3> output_mask) {
  if (any_needs_grad(grad_out, query, key, value) || has_tangent(grad_out))
    return attention_backward_aten(
        grad_out, query, key, value, attn_mask, output, stats, is_causal, scale, output_mask);
  return below_autograd(
      scaled_dot_product_attention_backward, grad_out, query, key, value, attn_mask, output, stats, is_causal, scale,
      output_mask);
}

// ---- autocast: the lower precision, as torch lists it ----

std::tuple<Tensor, Tensor> attention_autocast(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptTensor& attn_mask, bool is_causal,
    std::optional<double> scale) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCPU);
  const auto cast = [](const auto& t) { return autocast_to_lower(t, at::kCPU); };
  return scaled_dot_product_attention(cast(query), cast(key), cast(value), cast(attn_mask), is_causal, scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, Meta, m) {
  m.impl("scaled_dot_product_attention", attention_meta);
  m.impl("scaled_dot_product_attention_backward", attention_backward_meta);
}
TORCH_LIBRARY_IMPL(nnfast, Autograd, m) {
  m.impl("scaled_dot_product_attention", attention_autograd);
  m.impl("scaled_dot_product_attention_backward", attention_backward_autograd);
}
TORCH_LIBRARY_IMPL(nnfast, AutocastCPU, m) { m.impl("scaled_dot_product_attention", attention_autocast); }

}  // namespace nnfast
