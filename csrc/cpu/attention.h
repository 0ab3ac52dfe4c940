// Scaled dot product attention, forward and backward, in blocks of kBlock queries against kBlock keys, so that the
// probabilities are never more than a block (Dao et al., 2022: FlashAttention).
//
// Scalar math, for one query q with the keys k_j that it may see:
//   s_j = scale q . k_j + bias_j,   m = max s_j,   p_j = e^(s_j - m),   l = sum p_j,   output = sum p_j v_j / l
// block after block: where a later block raises m, what was summed before is multiplied by e^(old m - new m).
// Backward, with m and 1 / l kept from the forward, for in their sum m + log l digits would be lost to rounding:
//   p_j = e^(s_j - m) / l,   dp_j = grad . v_j,   ds_j = p_j (dp_j - delta),   delta = grad . output
//   grad_v_j = sum over queries of p_j grad,   grad_k_j = scale sum of ds_j q,   grad_q = scale sum of ds_j k_j
//
// Scores lie transposed, a row a key and a lane a query: maxima and sums over keys then never cross lanes. Every
// product is tile(): rows that are read a word at a time and broadcast, times rows of registers. A word is a float or,
// where the CPU multiplies pairs of bfloat16, two of those that follow each other in the dimension summed over.
//
// Every sum is taken in one order, whoever takes it: the result is the same for any number of threads.
//
// The products are in tiles.h, the backward in attention_backward.h; here are the scores and the forward.
#pragma once

#include "tiles.h"

namespace nnfast::NNFAST_ISA {

// ---- a block of scores ----

struct Scratch {
  char* p;  // null where only the size is asked for
  int64_t used;
  NNFAST_MEMBER float* floats(int64_t n) {
    const int64_t at = used;
    used += (n * sizeof(float) + 63) / 64 * 64;
    return p ? (float*)(p + at) : nullptr;
  }
};

// What the kernel knows of a block of queries against a block of keys.
struct Range {
  int64_t q0, queries, k0, keys;
  bool diagonal;  // a query here may be kept from a key here by the causal order
  // The column of the first register of queries of which one sees a key from `row` on.
  NNFAST_MEMBER int64_t first_column(int64_t row) const {
    return diagonal ? std::max<int64_t>(0, k0 + row - q0) / kLanes * kLanes : 0;
  }
  NNFAST_MEMBER int64_t columns() const { return padded(queries); }
};

// scores[key][query] = key . query, for the registers of queries that see any key of a tile.
template <class Op>
NNFAST_INLINE void score(const Range& range, int64_t width, Words keys, const float* queries, float* scores) {
  for (int64_t r = 0; r < range.keys; r += kTileRows) {
    const int64_t here = std::min<int64_t>(kTileRows, range.keys - r);
    for (int64_t n = range.first_column(r); n < range.columns(); n += kTileRegs * kLanes) {
      const int64_t regs = std::min<int64_t>(kTileRegs, (range.columns() - n) / kLanes);
      tile_of<Op, false, Into::set>(here, regs)(
          width, keys.from(r), {queries + n, kBlock}, scores + r * kBlock + n, kBlock, nullptr);
    }
  }
}

// v[i] = i < count ? minus infinity : v[i]; count may be more than the lanes are.
NNFAST_INLINE f32v hide_first(f32v v, int64_t count) {
  const auto n = (float)std::min(count, kLanes);
#ifdef NNFAST_AVX512
  const f32v lane = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  const f32v lane = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
#endif
  return blend_negative(lane - n, f32v(-INFINITY), v);
}

// row[j] = what is added to the score of key j: the mask, or minus infinity where a boolean one says no.
template <class M>
NNFAST_INLINE void mask_row(const M* mask, int64_t stride, int64_t n, float* row) {
  M gathered[kBlock];
  if (stride != 1 || (std::is_same_v<M, bool> && n % kLanes)) {
    for (int64_t j = 0; j < n; ++j) gathered[j] = mask[j * stride];
    mask = gathered;
  }
  if constexpr (std::is_same_v<M, bool>)
    for (int64_t j = 0; j < n; j += kLanes) {  // whole registers, and no branch, for some masks are random
      const f32v no = load(mask + j, Full<f32v>{}) - f32v(0.5f);
      store(row + j, blend_negative(no, f32v(-INFINITY), f32v(0.0f)), Full<f32v>{});
    }
  else
    sweep<float, f32v>(
        n, [&](int64_t j, auto part) NNFAST_LAMBDA { store(row + j, load(mask + j, part), Full<f32v>{}); });
}
// The mask's part for this block, transposed as the scores are; `rows` is room for as much again. Returns whether there
// is anything to add: a block whose keys all its queries see, as most of a causal mask's and of one for padding, is
// left as it is.
template <class M>
NNFAST_INLINE bool read_mask(const Attention& f, const M* mask, const Range& range, float* bias, float* rows) {
  const int64_t down = f.mask_strides[2], along = f.mask_strides[3];
  const M* p = mask + range.q0 * down + range.k0 * along;
  if constexpr (std::is_same_v<M, bool>)
    if (along == 1) {
      bool all = true;
      for (int64_t i = 0; all && i < (down ? range.queries : 1); ++i) all = !std::memchr(p + i * down, 0, range.keys);
      if (all) return false;
    }
  if (down == 0) {
    mask_row(p, along, range.keys, rows);
    for (int64_t j = 0; j < range.keys; ++j)
      for (int64_t n = 0; n < range.columns(); n += kLanes) store(bias + j * kBlock + n, f32v(rows[j]), Full<f32v>{});
    return true;
  }
  for (int64_t i = 0; i < range.queries; ++i) mask_row(p + i * down, along, range.keys, rows + i * kBlock);
  transpose({rows, kBlock}, range.queries, range.keys, bias);
  return true;
}
NNFAST_INLINE bool read_mask(const Attention& f, int64_t b, int64_t h, const Range& range, float* bias, float* rows) {
  const int64_t offset = b * f.mask_strides[0] + h * f.mask_strides[1];
  switch (f.mask_type) {
    case Attention::Mask::none: return false;
    case Attention::Mask::boolean: return read_mask(f, (const bool*)f.mask + offset, range, bias, rows);
    case Attention::Mask::f32: return read_mask(f, (const float*)f.mask + offset, range, bias, rows);
    case Attention::Mask::bf16: return read_mask(f, (const bf16*)f.mask + offset, range, bias, rows);
    case Attention::Mask::f16: return read_mask(f, (const f16*)f.mask + offset, range, bias, rows);
  }
  return false;
}

// scores = scores scale + bias, where scaled_first(): the exponential then has no scale left to apply. Elsewhere this
// is not called, and the exponential applies the scale, after the maximum is subtracted.
NNFAST_INLINE void add_mask(const Attention& f, int64_t b, int64_t h, const Range& range, float* scores, float* bias) {
  const bool masked = read_mask(f, b, h, range, bias, bias + kBlock * kBlock);
  const f32v scale = (float)f.scale;
  for (int64_t j = 0; j < range.keys; ++j)
    for (int64_t n = range.first_column(j); n < range.columns(); n += kLanes) {
      f32v s = load(scores + j * kBlock + n, Full<f32v>{}) * scale;
      if (masked) s = s + load(bias + j * kBlock + n, Full<f32v>{});
      store(scores + j * kBlock + n, s, Full<f32v>{});
    }
}

template <class T>
NNFAST_INLINE T* row_of(const Attention::Tensor& t, int64_t b, int64_t h, int64_t row) {
  return (T*)t.p + b * t.strides[0] + h * t.strides[1] + row * t.strides[2];
}
template <class T>
NNFAST_INLINE Source<T> head(const Attention::Tensor& t, int64_t b, int64_t h, int64_t row) {
  return {row_of<T>(t, b, h, row), t.strides[2]};
}

// ---- forward ----

// Blocks of keys that a block of queries sees.
NNFAST_INLINE int64_t key_blocks(const Attention& f, int64_t q0) {
  const int64_t last = f.causal ? std::min(f.keys, std::min(q0 + kBlock, f.queries)) : f.keys;
  return (last + kBlock - 1) / kBlock;
}
NNFAST_INLINE Range range_of(const Attention& f, int64_t q0, int64_t k0) {
  const int64_t queries = std::min(kBlock, f.queries - q0), keys = std::min(kBlock, f.keys - k0);
  return {q0, queries, k0, keys, f.causal && k0 + keys - 1 > q0};
}

// How many rows, keys, are seen by any lane of the register of queries at `column`.
NNFAST_INLINE int64_t seen(const Range& range, int64_t column) {
  return range.diagonal ? std::min(range.keys, range.q0 + column + kLanes - range.k0) : range.keys;
}
// Scores of keys that a query must not see become minus infinity: by the causal order, and in the rows past the last
// key, up to a whole group of kGroup rows.
constexpr int64_t kGroup = 4;
NNFAST_INLINE int64_t groups_of(int64_t rows) { return (rows + kGroup - 1) / kGroup * kGroup; }
NNFAST_INLINE void hide(const Range& range, int64_t column, int64_t rows, float* scores) {
  if (range.diagonal)
    for (int64_t j = std::max<int64_t>(0, range.q0 + column + 1 - range.k0); j < rows; ++j) {
      float* s = scores + j * kBlock + column;
      store(s, hide_first(load(s, Full<f32v>{}), range.k0 + j - range.q0 - column), Full<f32v>{});
    }
  for (int64_t j = rows; j < groups_of(rows); ++j) store(scores + j * kBlock + column, f32v(-INFINITY), Full<f32v>{});
}
NNFAST_INLINE Quad<float> load_group(const float* p) {
  constexpr Full<f32v> one;
  return {{load(p, one), load(p + kBlock, one)}, {load(p + 2 * kBlock, one), load(p + 3 * kBlock, one)}};
}
NNFAST_INLINE f32v add_rows(Quad<float> v) { return (v.lo.lo + v.lo.hi) + (v.hi.lo + v.hi.hi); }
NNFAST_INLINE Quad<float> each_row(f32v v) { return {{v, v}, {v, v}}; }
template <class T>
NNFAST_INLINE void store_across(float* to, int64_t row, int64_t column, Quad<float> p) {
  store_across<T>(to, row, column, p.lo.lo, p.lo.hi);
  store_across<T>(to, row + 2, column, p.hi.lo, p.hi.hi);
}

// 2^(x unit) for x unit <= 0, unit > 0; minus infinity gives 0. The product is not rounded before its whole part is
// taken away, and unit has twice a float's digits: a large exponent costs no accuracy.
struct Exponential {
  float unit, rest, least;
  NNFAST_MEMBER explicit Exponential(double u)
      : unit((float)u), rest((float)(u - (float)u)), least((float)(-200 / u)) {}
  template <class V>
  NNFAST_MEMBER V operator()(V x) const {
    x = at_least(V(least), x);
    const V n = round(x * V(unit));
    return exp2_of(n, x * V(rest) + (x * V(unit) - n));
  }
};
constexpr double kLog2E = 1.4426950408889634;

// The scores of a block become p = e^(score - maximum), as T stores them. maximum and sum, one a query, take the block
// in, and factor is what all sums before it are to be multiplied by. exp applies the scale, where the scores still lack
// it.
template <class T>
NNFAST_INLINE void softmax(
    const Range& range, const Exponential& exp, float* scores, float* p, float* maximum, float* sum, float* factor) {
  for (int64_t n = 0; n < range.columns(); n += kLanes) {
    const int64_t rows = seen(range, n), all = groups_of(range.keys);
    hide(range, n, rows, scores);
    const f32v most_before = load(maximum + n, Full<f32v>{});
    auto most_of = each_row(most_before);
    int64_t j = 0;
    // A NaN is passed over here, and shows in the sum.
    for (; j < rows; j += kGroup) most_of = at_least(load_group(scores + j * kBlock + n), most_of);
    const f32v most = at_least(at_least(most_of.lo.lo, most_of.lo.hi), at_least(most_of.hi.lo, most_of.hi.hi));
    // Where no key was seen yet, 0 is subtracted instead, and e^(-infinity - 0) = 0.
    const f32v base = blend_negative(most + 3.40282347e38f, f32v(0.0f), most);
    auto total = each_row(0.0f);
    for (j = 0; j < rows; j += kGroup) {
      const auto e = exp(load_group(scores + j * kBlock + n) - each_row(base));
      total = total + e;
      store_across<T>(p, j, n, e);
    }
    for (; j < all; j += kGroup) store_across<T>(p, j, n, each_row(0.0f));
    const f32v old = exp(most_before - base);
    store(factor + n, old, Full<f32v>{});
    store(maximum + n, most, Full<f32v>{});
    store(sum + n, load(sum + n, Full<f32v>{}) * old + add_rows(total), Full<f32v>{});
  }
}

// The span of a product whose rows are queries and that sums over keys: those that rows r0 to r1 see.
template <class T>
struct KeysSeen {
  const Range& range;
  NNFAST_MEMBER std::pair<int64_t, int64_t> operator()(int64_t, int64_t r1) const {
    return {0, words<T>(range.diagonal ? std::min(range.keys, range.q0 + r1 - range.k0) : range.keys)};
  }
};
// The same where rows are keys and the sum is over queries: those that see any of the rows r0 to r1.
template <class T>
struct QueriesSeeing {
  const Range& range;
  NNFAST_MEMBER std::pair<int64_t, int64_t> operator()(int64_t r0, int64_t) const {
    const int64_t last = words<T>(range.queries);
    if (!range.diagonal) return {0, last};
    return {std::min(last, std::max<int64_t>(0, range.k0 + r0 - range.q0) / Product<T>::type::per_word), last};
  }
};

// to[r] = from[r] factors[r] or, without factors, from[r] factor.
template <class T>
NNFAST_INLINE void write_rows(
    const Attention::Tensor& t, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t width, const float* from,
    int64_t stride, const float* factors, float factor) {
  if (!t.p) return;  // not wanted
  for (int64_t r = 0; r < rows; ++r) {
    T* to = row_of<T>(t, b, h, row + r);
    const float* v = from + r * stride;
    sweep<float>(width, [&](int64_t i, auto part) NNFAST_LAMBDA {
      using V = typename decltype(part)::vec;
      store(to + i, load(v + i, part) * V(factors ? factors[r] : factor), part);
    });
  }
}

struct ForwardSpace {
  float *query_words, *queries, *key_words, *value_words, *values, *scores, *p, *bias, *output, *maximum, *sum, *factor;
  NNFAST_MEMBER explicit ForwardSpace(const Attention& f, Scratch& s) {
    const int64_t e = padded(f.size), ev = padded(f.value_size);
    query_words = s.floats(kBlock * e), queries = s.floats(kBlock * e), key_words = s.floats(kBlock * e);
    value_words = s.floats(kBlock * ev), values = s.floats(kBlock * ev), output = s.floats(kBlock * ev);
    scores = s.floats(kBlock * kBlock), p = s.floats(kBlock * kBlock), bias = s.floats(2 * kBlock * kBlock);
    maximum = s.floats(kBlock), sum = s.floats(kBlock), factor = s.floats(kBlock);
  }
};

// One block of queries of one head: the tasks count blocks within heads within the batch.
template <class T>
void attention_block(const Attention& f, int64_t task, Scratch scratch) {
  using Op = typename Product<T>::type;
  ForwardSpace s(f, scratch);
  const int64_t blocks = f.query_blocks(), bh = task / blocks, b = bh / f.heads, h = bh % f.heads;
  const int64_t q0 = task % blocks * kBlock, kv = h / (f.heads / f.kv_heads),
                queries = std::min(kBlock, f.queries - q0);
  const int64_t e = words<T>(f.size), ev = padded(f.value_size);
  transpose(by_words<T>(head<T>(f.query, b, h, q0), queries, f.size, s.query_words), queries, e, s.queries);
  for (int64_t i = 0; i < kBlock; ++i) s.maximum[i] = -INFINITY, s.sum[i] = 0;
  const bool scaled = f.scaled_first();
  const Exponential exp(scaled ? kLog2E : f.scale * kLog2E);
  const int64_t last = key_blocks(f, q0);
  for (int64_t block = 0; block < last; ++block) {
    const Range range = range_of(f, q0, block * kBlock);
    const auto keys = head<T>(f.key, b, kv, range.k0), values = head<T>(f.value, b, kv, range.k0);
    score<Op>(range, e, by_words<T>(keys, range.keys, f.size, s.key_words), s.queries, s.scores);
    if (scaled) add_mask(f, b, h, range, s.scores, s.bias);
    float* const p = kPaired<T> ? s.p : s.scores;
    softmax<T>(range, exp, s.scores, p, s.maximum, s.sum, s.factor);
    Words v{};
    if constexpr (!kPaired<T>) v = by_words<T>(values, range.keys, f.value_size, s.value_words);
    v = by_registers<T>(values, range.keys, f.value_size, v, s.values);
    const auto add = [&](auto into) NNFAST_LAMBDA {
      product_by_rows<Op, true, decltype(into)::value>(
          queries, ev, {p, kBlock}, v, s.output, ev, s.factor, KeysSeen<T>{range});
    };
    if (block == 0)
      add(std::integral_constant<Into, Into::set>{});
    else
      add(std::integral_constant<Into, Into::scale>{});
  }
  float *maximum = f.stats + bh * f.queries + q0, *inverse = maximum + f.batch * f.heads * f.queries;
  for (int64_t i = 0; i < queries; ++i) {
    // A query that sees no key: its output is 0, and the backward finds no probabilities either.
    const bool none = s.sum[i] == 0;
    maximum[i] = none ? INFINITY : s.maximum[i];
    inverse[i] = s.factor[i] = none ? 0.0f : 1.0f / s.sum[i];
  }
  write_rows<T>(f.output, b, h, q0, queries, f.value_size, s.output, ev, s.factor, 0);
}

}  // namespace nnfast::NNFAST_ISA
