// An embedding, by torch's own kernels, whose gradient lies in memory of ours: most of the time of torch's goes to
// mapping fresh pages for a table of zeros.
#pragma once

#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_dense_backward.h>

#include "../cpu/memory.h"
#include "../ops/op.h"
#include "autograd.h"
#include "paths.h"

namespace nnfast {

inline Path embedding_recorded("embedding");

// Where there is nothing to be won, it is all torch's.
inline bool covers_embedding(const Tensor& indices, const Tensor& weight) {
  return indices.is_cpu() && weight.is_cpu() && weight.dim() == 2 && any_needs_grad(weight) &&
         (indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt) && is_large(weight.nbytes());
}

struct Embedding {
  static constexpr auto name = "EmbeddingBackward";
  static constexpr bool is_traceable = false;

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const NotRecorded guard;
    if (!grads[0].defined()) return {Tensor()};
    const int64_t rows = ctx->saved_data["rows"].toInt();
    const ForTorch memory(rows * grads[0].size(-1) * grads[0].element_size());
    return {at::embedding_dense_backward(grads[0], saved[0], rows, ctx->saved_data["padding_idx"].toInt(), false)};
  }
};

inline Tensor embedding(const Tensor& indices, const Tensor& weight, int64_t padding_idx) {
  embedding_recorded.taken();
  const Tensor output = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return at::embedding(weight, indices, padding_idx);
  }();
  const auto node = make_node<Embedding>(weight);
  node->ctx_.saved_data["rows"] = weight.size(0);
  node->ctx_.saved_data["padding_idx"] = padding_idx;
  record(node, output, {indices});
  return output;
}

}  // namespace nnfast
