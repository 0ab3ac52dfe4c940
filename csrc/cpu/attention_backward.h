// The backward of attention; its formulas are in attention.h.
#pragma once

#include "attention.h"

namespace nnfast::NNFAST_ISA {

// What every part of the backward needs of a block of queries, of a block of keys, and of the two.
struct BackwardSpace {
  float *query_words, *queries, *query_rows, *grad_words, *grads, *grad_rows, *key_words, *key_rows, *value_words;
  float *scores, *grad_p, *p, *grad_scores, *grad_scores_across, *bias, *maximum, *inverse, *delta;
  NNFAST_MEMBER BackwardSpace(const Attention& f, Scratch& s) {
    const int64_t e = kBlock * padded(f.size), ev = kBlock * padded(f.value_size), block = kBlock * kBlock;
    for (float** t : {&query_words, &queries, &query_rows, &key_words, &key_rows}) *t = s.floats(e);
    for (float** t : {&grad_words, &grads, &grad_rows, &value_words}) *t = s.floats(ev);
    for (float** t : {&scores, &grad_p}) *t = s.floats(block);
    bias = s.floats(2 * block);  // and room to read the mask
    p = scores, grad_scores = grad_scores_across = grad_p;
    if (kPaired<bf16> && f.dtype == DType::bf16)
      for (float** t : {&p, &grad_scores, &grad_scores_across}) *t = s.floats(block / 2);
    for (float** t : {&maximum, &inverse, &delta}) *t = s.floats(kBlock);
  }
};

template <class T>
struct BackwardBlocks {
  using Op = typename Product<T>::type;
  const Attention& f;
  BackwardSpace s;
  int64_t b, h, kv, e, ev;
  Words query_rows, grad_rows, key_words, key_rows, value_words;

  NNFAST_MEMBER BackwardBlocks(const Attention& f, Scratch& scratch)
      : f(f), s(f, scratch), e(words<T>(f.size)), ev(words<T>(f.value_size)) {}

  // Takes a block of queries: them and their grad_out, transposed and, with `rows`, by rows; the statistics and delta.
  NNFAST_MEMBER void take_queries(int64_t q0, bool rows) {
    const int64_t queries = std::min(kBlock, f.queries - q0);
    const auto q = head<T>(f.query, b, h, q0), g = head<T>(f.grad_out, b, h, q0), o = head<T>(f.output, b, h, q0);
    const Words q_words = by_words<T>(q, queries, f.size, s.query_words);
    const Words g_words = by_words<T>(g, queries, f.value_size, s.grad_words);
    transpose(q_words, queries, e, s.queries);
    transpose(g_words, queries, ev, s.grads);
    if (rows) {
      query_rows = by_registers<T>(q, queries, f.size, q_words, s.query_rows);
      grad_rows = by_registers<T>(g, queries, f.value_size, g_words, s.grad_rows);
    }
    const float* maximum = f.stats + (b * f.heads + h) * f.queries + q0;
    const float* inverse = maximum + f.batch * f.heads * f.queries;
    for (int64_t i = 0; i < kBlock; ++i) {
      // Where there is no query, no probability.
      s.maximum[i] = i < queries ? maximum[i] : INFINITY;
      s.inverse[i] = i < queries ? inverse[i] : 0.0f;
      Sum<float> delta;
      if (i < queries)
        sweep<float>(f.value_size, [&](int64_t d, auto part) NNFAST_LAMBDA {
          delta += keep(load(g.p + i * g.stride + d, part) * load(o.p + i * o.stride + d, part), part);
        });
      s.delta[i] = delta.total();
    }
  }
  NNFAST_MEMBER void take_keys(int64_t k0, bool rows) {
    const int64_t keys = std::min(kBlock, f.keys - k0);
    const auto k = head<T>(f.key, b, kv, k0);
    key_words = by_words<T>(k, keys, f.size, s.key_words);
    value_words = by_words<T>(head<T>(f.value, b, kv, k0), keys, f.value_size, s.value_words);
    if (rows) key_rows = by_registers<T>(k, keys, f.size, key_words, s.key_rows);
  }

  // The probabilities of a block, and the gradients of its scores before the scale.
  NNFAST_MEMBER void differentiate(const Range& range) {
    score<Op>(range, e, key_words, s.queries, s.scores);
    score<Op>(range, ev, value_words, s.grads, s.grad_p);
    const bool scaled = f.scaled_first();
    if (scaled) add_mask(f, b, h, range, s.scores, s.bias);
    const Exponential exp(scaled ? kLog2E : f.scale * kLog2E);
    for (int64_t n = 0; n < range.columns(); n += kLanes) {
      const int64_t rows = seen(range, n), all = groups_of(range.keys);
      hide(range, n, rows, s.scores);
      for (int64_t j = rows; j < groups_of(rows); ++j) store(s.grad_p + j * kBlock + n, f32v(0.0f), Full<f32v>{});
      const auto most = each_row(load(s.maximum + n, Full<f32v>{}));
      const auto inverse = each_row(load(s.inverse + n, Full<f32v>{}));
      const auto delta = each_row(load(s.delta + n, Full<f32v>{}));
      int64_t j = 0;
      for (; j < rows; j += kGroup) {
        const auto p = exp(load_group(s.scores + j * kBlock + n) - most) * inverse;
        store_p(j, n, p, p * (load_group(s.grad_p + j * kBlock + n) - delta));
      }
      for (; j < all; j += kGroup) store_p(j, n, each_row(0.0f), each_row(0.0f));
    }
  }
  NNFAST_MEMBER void store_p(int64_t row, int64_t column, Quad<float> p, Quad<float> grad) {
    if constexpr (kPaired<T>) {
      store_rows((T*)s.p + row * kBlock + column, p);
      store_rows((T*)s.grad_scores + row * kBlock + column, grad);
      store_across<T>(s.grad_scores_across, row, column, grad);
    } else {
      store_rows(s.p + row * kBlock + column, p);
      store_rows(s.grad_scores + row * kBlock + column, grad);
    }
  }
  template <class W>
  static NNFAST_MEMBER void store_rows(W* to, Quad<float> v) {
    constexpr Full<f32v> one;
    store(to, v.lo.lo, one), store(to + kBlock, v.lo.hi, one);
    store(to + 2 * kBlock, v.hi.lo, one), store(to + 3 * kBlock, v.hi.hi, one);
  }

  // The three gradients of a block, each added to what the blocks before it gave; the first block sets it.
  template <bool Across, class Span>
  NNFAST_MEMBER void add(bool first, int64_t rows, int64_t columns, Words a, Words rows_of_b, float* to, Span span) {
    if (first)
      product_by_rows<Op, Across, Into::set>(rows, columns, a, rows_of_b, to, columns, nullptr, span);
    else
      product_by_rows<Op, Across, Into::add>(rows, columns, a, rows_of_b, to, columns, nullptr, span);
  }
  NNFAST_MEMBER void add_grad_query(const Range& range, bool first, float* to) {
    add<true>(first, range.queries, padded(f.size), {s.grad_scores_across, kBlock}, key_rows, to, KeysSeen<T>{range});
  }
  NNFAST_MEMBER void add_grad_key(const Range& range, bool first, float* to) {
    add<false>(
        first, range.keys, padded(f.size), {s.grad_scores, words<T>(kBlock)}, query_rows, to, QueriesSeeing<T>{range});
  }
  NNFAST_MEMBER void add_grad_value(const Range& range, bool first, float* to) {
    add<false>(
        first, range.keys, padded(f.value_size), {s.p, words<T>(kBlock)}, grad_rows, to, QueriesSeeing<T>{range});
  }
};

// The first block of queries that sees anything of a block of keys.
NNFAST_INLINE int64_t first_query_block(const Attention& f, int64_t k0) { return f.causal ? k0 / kBlock : 0; }

// All of one head of keys and values, with every head of queries that reads it: each block of probabilities is made
// once. Needs room for the gradients of all its keys and values.
template <class T>
void attention_backward_head(const Attention& f, int64_t task, Scratch scratch) {
  BackwardBlocks<T> blocks(f, scratch);
  const int64_t group = f.heads / f.kv_heads, e = padded(f.size), ev = padded(f.value_size);
  float *grad_key = scratch.floats(f.keys * e), *grad_value = scratch.floats(f.keys * ev);
  float* const grad_query = scratch.floats(kBlock * e);
  const int64_t b = blocks.b = task / f.kv_heads, kv = blocks.kv = task % f.kv_heads;
  for (int64_t g = 0; g < group; ++g)
    for (int64_t q0 = 0; q0 < f.queries; q0 += kBlock) {
      blocks.h = kv * group + g;
      blocks.take_queries(q0, true);
      const int64_t last = key_blocks(f, q0);
      for (int64_t block = 0; block < last; ++block) {
        const Range range = range_of(f, q0, block * kBlock);
        const bool first = g == 0 && q0 == first_query_block(f, range.k0) * kBlock;
        blocks.take_keys(range.k0, true);
        blocks.differentiate(range);
        if (f.grad_query.p) blocks.add_grad_query(range, block == 0, grad_query);
        if (f.grad_key.p) blocks.add_grad_key(range, first, grad_key + range.k0 * e);
        if (f.grad_value.p) blocks.add_grad_value(range, first, grad_value + range.k0 * ev);
      }
      write_rows<T>(
          f.grad_query, b, blocks.h, q0, std::min(kBlock, f.queries - q0), f.size, grad_query, e, nullptr,
          (float)f.scale);
    }
  // Keys that no query sees have zero gradients.
  const int64_t read = key_blocks(f, f.queries - 1) * kBlock;
  if (read < f.keys) {
    std::fill(grad_key + read * e, grad_key + f.keys * e, 0.0f);
    std::fill(grad_value + read * ev, grad_value + f.keys * ev, 0.0f);
  }
  write_rows<T>(f.grad_key, b, kv, 0, f.keys, f.size, grad_key, e, nullptr, (float)f.scale);
  write_rows<T>(f.grad_value, b, kv, 0, f.keys, f.value_size, grad_value, ev, nullptr, 1.0f);
}

// Where there are not enough heads for the threads, or too many keys to keep their gradients at hand: the gradients of
// a block of queries, and those of a block of keys, each by itself. Blocks of probabilities are then made twice, and
// every sum is taken in the same order.
template <class T>
void attention_backward_queries(const Attention& f, int64_t task, Scratch scratch) {
  BackwardBlocks<T> blocks(f, scratch);
  const int64_t e = padded(f.size), count = f.query_blocks(), bh = task / count, q0 = task % count * kBlock;
  float* const grad_query = scratch.floats(kBlock * e);
  blocks.b = bh / f.heads, blocks.h = bh % f.heads, blocks.kv = blocks.h / (f.heads / f.kv_heads);
  blocks.take_queries(q0, false);
  const int64_t last = key_blocks(f, q0);
  for (int64_t block = 0; block < last; ++block) {
    const Range range = range_of(f, q0, block * kBlock);
    blocks.take_keys(range.k0, true);
    blocks.differentiate(range);
    blocks.add_grad_query(range, block == 0, grad_query);
  }
  write_rows<T>(
      f.grad_query, blocks.b, blocks.h, q0, std::min(kBlock, f.queries - q0), f.size, grad_query, e, nullptr,
      (float)f.scale);
}
template <class T>
void attention_backward_keys(const Attention& f, int64_t task, Scratch scratch) {
  BackwardBlocks<T> blocks(f, scratch);
  const int64_t e = padded(f.size), ev = padded(f.value_size), group = f.heads / f.kv_heads;
  float *grad_key = scratch.floats(kBlock * e), *grad_value = scratch.floats(kBlock * ev);
  const int64_t count = f.key_blocks(), k0 = task % count * kBlock, keys = std::min(kBlock, f.keys - k0);
  const int64_t b = blocks.b = task / count / f.kv_heads, kv = blocks.kv = task / count % f.kv_heads;
  blocks.take_keys(k0, false);
  bool first = true;
  for (int64_t g = 0; g < group; ++g)
    for (int64_t q0 = first_query_block(f, k0) * kBlock; q0 < f.queries; q0 += kBlock, first = false) {
      blocks.h = kv * group + g;
      const Range range = range_of(f, q0, k0);
      blocks.take_queries(q0, true);
      blocks.differentiate(range);
      if (f.grad_key.p) blocks.add_grad_key(range, first, grad_key);
      if (f.grad_value.p) blocks.add_grad_value(range, first, grad_value);
    }
  if (first) {
    std::fill(grad_key, grad_key + keys * e, 0.0f);
    std::fill(grad_value, grad_value + keys * ev, 0.0f);
  }
  write_rows<T>(f.grad_key, b, kv, k0, keys, f.size, grad_key, e, nullptr, (float)f.scale);
  write_rows<T>(f.grad_value, b, kv, k0, keys, f.value_size, grad_value, ev, nullptr, 1.0f);
}

NNFAST_INLINE void attention(const Attention& f, Attention::Part part, int64_t task, void* space) {
  visit(f.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (sizeof(T) < 8) {
      const Scratch scratch{(char*)space, 0};
      switch (part) {
        case Attention::Part::forward: return attention_block<T>(f, task, scratch);
        case Attention::Part::backward_head: return attention_backward_head<T>(f, task, scratch);
        case Attention::Part::backward_queries: return attention_backward_queries<T>(f, task, scratch);
        case Attention::Part::backward_keys: return attention_backward_keys<T>(f, task, scratch);
      }
    }
  });
}
NNFAST_INLINE int64_t attention_scratch(const Attention& f, Attention::Part part) {
  Scratch s{nullptr, 0};
  if (part == Attention::Part::forward) {
    ForwardSpace space(f, s);
    return s.used;
  }
  BackwardSpace space(f, s);
  s.floats(kBlock * padded(f.size));
  const int64_t keys = part == Attention::Part::backward_head ? f.keys : kBlock;
  s.floats(keys * padded(f.size)), s.floats(keys * padded(f.value_size));
  return s.used;
}

}  // namespace nnfast::NNFAST_ISA
