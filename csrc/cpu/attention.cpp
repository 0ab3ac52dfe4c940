// Scaled dot product attention on a CPU: memory and threads. The arithmetic is in attention.h.
#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "../ops/op.h"
#include "../ops/paths.h"
#include "cpu.h"
#include "memory.h"

namespace nnfast {
namespace {

Path forward("scaled_dot_product_attention"), backward("scaled_dot_product_attention_backward");
Path by_heads("attention.backward_by_heads"), by_blocks("attention.backward_by_blocks");
// What a thread multiplies and adds at the least: below, waking one more costs more than it brings.
Threshold thread_multiply_adds("attention.thread_multiply_adds", 500'000);
// The most memory a thread takes for the gradients of a head, to make each block of probabilities once. A result does
// not depend on it.
Threshold head_bytes("attention.head_bytes", int64_t(8) << 20);

// The last dimension of each must be contiguous.
Tensor by_rows(const Tensor& t) { return t.stride(3) == 1 || t.size(3) == 1 ? t : t.contiguous(); }

Attention::Tensor view(const Tensor& t) {
  if (!t.defined()) return {};
  return {const_cast<void*>(t.const_data_ptr()), {t.stride(0), t.stride(1), t.stride(2)}};
}

// Holds what the views point to.
struct Call {
  Tensor query, key, value, mask;
  Attention f{};

  Call(
      const Tensor& query_, const Tensor& key_, const Tensor& value_, const OptTensor& attn_mask, bool is_causal,
      std::optional<double> scale)
      : query(by_rows(query_)), key(by_rows(key_)), value(by_rows(value_)) {
    f.dtype = cpu_dtype(query);
    f.batch = query.size(0), f.heads = query.size(1), f.kv_heads = key.size(1);
    f.queries = query.size(2), f.keys = key.size(2), f.size = query.size(3), f.value_size = value.size(3);
    f.causal = is_causal;
    f.scale = scale.value_or(1 / std::sqrt((double)f.size));
    f.query = view(query), f.key = view(key), f.value = view(value);
    if (!defined(attn_mask)) return;
    mask = attn_mask->expand({f.batch, f.heads, f.queries, f.keys});
    f.mask = mask.const_data_ptr();
    std::copy_n(mask.strides().begin(), 4, f.mask_strides);
    const auto type = mask.scalar_type();
    f.mask_type = type == at::kBool       ? Attention::Mask::boolean
                  : type == at::kFloat    ? Attention::Mask::f32
                  : type == at::kBFloat16 ? Attention::Mask::bf16
                                          : Attention::Mask::f16;
  }

  int64_t threads() const {
    const int64_t work = f.batch * f.heads * f.queries * f.keys * (f.size + f.value_size) / (f.causal ? 2 : 1);
    return threads_for(work, thread_multiply_adds);
  }
  // Every task once, by whichever thread is free. The last of a head first: in causal order they take longest.
  void run(Attention::Part part, int64_t tasks) const {
    const int64_t threads = std::min(this->threads(), tasks), bytes = cpu_kernels()->attention_scratch(f, part);
    const Tensor scratch = empty({threads, bytes}, at::kByte);
    auto* const space = (char*)scratch.mutable_data_ptr();
    std::atomic<int64_t> left{tasks};
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t thread = first; thread < last; ++thread)
        for (int64_t task; (task = left.fetch_sub(1, std::memory_order_relaxed) - 1) >= 0;)
          cpu_kernels()->attention(f, part, task, space + thread * bytes);
    });
  }
};

std::tuple<Tensor, Tensor> attention_cpu(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptTensor& attn_mask, bool is_causal,
    std::optional<double> scale) {
  check_covered(
      cpu_kernels() && covers_attention(query, key, value, attn_mask, is_causal), "scaled_dot_product_attention");
  forward.taken();
  Call call(query, key, value, attn_mask, is_causal, scale);
  auto sizes = query.sizes().vec();
  sizes[3] = value.size(3);
  Tensor output = empty(sizes, query.scalar_type());
  if (const auto strides = attention_strides(query, key, value, attn_mask)) output = output.as_strided(sizes, *strides);
  Tensor stats = empty({2, sizes[0], sizes[1], sizes[2]}, at::kFloat);
  call.f.output = view(output);
  call.f.stats = stats.mutable_data_ptr<float>();
  call.run(Attention::Part::forward, call.f.batch * call.f.heads * call.f.query_blocks());
  return {output, stats};
}

// As torch's op lays gradients out: the heads of a row follow each other.
Tensor empty_gradient(const Tensor& t) {
  return empty({t.size(0), t.size(2), t.size(1), t.size(3)}, t.scalar_type()).transpose(1, 2);
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& grad_out_, const Tensor& query, const Tensor& key, const Tensor& value, const OptTensor& attn_mask,
    const Tensor& output_, const Tensor& stats, bool is_causal, std::optional<double> scale,
    std::array<bool, 3> output_mask) {
  check_covered(
      cpu_kernels() && covers_attention(query, key, value, attn_mask, is_causal),
      "scaled_dot_product_attention_backward");
  check_attention_backward(grad_out_, query, value, output_, stats);
  backward.taken();
  Call call(query, key, value, attn_mask, is_causal, scale);
  Attention& f = call.f;
  const Tensor grad_out = by_rows(grad_out_), output = by_rows(output_), kept = stats.contiguous();
  const Tensor grad_query = output_mask[0] ? empty_gradient(query) : Tensor();
  const Tensor grad_key = output_mask[1] ? empty_gradient(key) : Tensor();
  const Tensor grad_value = output_mask[2] ? empty_gradient(value) : Tensor();
  f.output = view(output), f.stats = const_cast<float*>(kept.const_data_ptr<float>()), f.grad_out = view(grad_out);
  f.grad_query = view(grad_query), f.grad_key = view(grad_key), f.grad_value = view(grad_value);
  // By heads there are five products a block; by blocks, which make two of them twice, seven.
  const int64_t heads = f.batch * f.kv_heads, threads = call.threads(), rounds = at::ceil_div(heads, threads);
  const bool enough = rounds * threads * 5 <= heads * 7;
  if (enough && cpu_kernels()->attention_scratch(f, Attention::Part::backward_head) <= head_bytes) {
    by_heads.taken();
    call.run(Attention::Part::backward_head, heads);
  } else {
    by_blocks.taken();
    if (grad_query.defined()) call.run(Attention::Part::backward_queries, f.batch * f.heads * f.query_blocks());
    if (grad_key.defined() || grad_value.defined()) call.run(Attention::Part::backward_keys, heads * f.key_blocks());
  }
  return {grad_query, grad_key, grad_value};
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CPU, m) {
  m.impl("scaled_dot_product_attention", attention_cpu);
  m.impl("scaled_dot_product_attention_backward", attention_backward_cpu);
}

}  // namespace nnfast
