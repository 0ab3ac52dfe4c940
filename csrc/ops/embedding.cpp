// The contract of Embedding: schema, which calls are covered, autograd. The arithmetic is torch's; what is ours is the
// memory of the gradient. It is as large as the table and mostly zeros, and mapped afresh at every step it costs a page
// fault for every 4 KB of them, several times what writing them takes.
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <torch/library.h>

#include "../cpu/memory.h"
#include "autograd.h"
#include "op.h"
#include "paths.h"

namespace nnfast {

TORCH_LIBRARY_FRAGMENT(nnfast, m) {
  m.def("embedding(Tensor weight, Tensor indices, SymInt padding_idx=-1, bool scale_grad_by_freq=False) -> Tensor");
}

Tensor embedding(const Tensor& weight, const Tensor& indices, c10::SymInt padding_idx, bool scale_grad_by_freq) {
  static const auto op = find_op<decltype(embedding)>("embedding");
  return op.call(weight, indices, std::move(padding_idx), scale_grad_by_freq);
}

// From so many bytes on, memory that was touched before saves more than a node of ours costs.
Threshold table_bytes("embedding.table_bytes", int64_t(2) << 20);

bool covers_embedding(const Tensor& weight, const Tensor& indices, int64_t padding_idx) {
  return weight.is_cpu() && indices.is_cpu() && weight.dim() == 2 && known_dtype(weight.scalar_type()) &&
         (indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt) && any_needs_grad(weight) &&
         (int64_t)weight.nbytes() >= table_bytes && padding_idx >= -1 && padding_idx < weight.size(0);
}

namespace {

Path served("embedding"), into_memory("embedding.into_memory");

Tensor embedding_aten(const Tensor& weight, const Tensor& indices, c10::SymInt padding_idx, bool scale_grad_by_freq) {
  served.taken();
  return at::embedding_symint(weight, indices, std::move(padding_idx), scale_grad_by_freq, /*sparse=*/false);
}

struct Embedding {
  static constexpr auto name = "EmbeddingBackward";
  static constexpr bool is_traceable = false;

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    if (!grads[0].defined()) return {Tensor()};
    const Tensor &grad = grads[0], &indices = saved[0];
    const auto rows = ctx->saved_data["rows"].toSymInt(), padding_idx = ctx->saved_data["padding_idx"].toSymInt();
    const bool sized = grad.is_cpu() && !grad.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
    const int64_t bytes = sized ? rows.expect_int() * grad.size(-1) * (int64_t)grad.element_size() : 0;
    if (bytes) into_memory.taken();
    const ForTorch memory(bytes);
    return {at::embedding_dense_backward_symint(
        grad, indices, rows, padding_idx, ctx->saved_data["scale_grad_by_freq"].toBool())};
  }
};

Tensor embedding_autograd(
    const Tensor& weight, const Tensor& indices, c10::SymInt padding_idx, bool scale_grad_by_freq) {
  const Tensor output = below_autograd(nnfast::embedding, weight, indices, padding_idx, scale_grad_by_freq);
  if (!any_needs_grad(weight)) return output;
  const auto node = make_node<Embedding>(weight);
  node->ctx_.saved_data["rows"] = weight.sym_size(0);
  node->ctx_.saved_data["padding_idx"] = padding_idx;
  node->ctx_.saved_data["scale_grad_by_freq"] = scale_grad_by_freq;
  record(node, output, {indices});
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CompositeExplicitAutograd, m) { m.impl("embedding", embedding_aten); }
TORCH_LIBRARY_IMPL(nnfast, Autograd, m) { m.impl("embedding", embedding_autograd); }

}  // namespace nnfast
