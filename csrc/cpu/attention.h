// Scaled dot product attention, forward and backward, in blocks of kBlock queries against kBlock keys, so that the
// probabilities are never more than a block (Dao et al., 2022: FlashAttention).
//
// Scalar math, for one query q with the keys k_j that it may see:
//   s_j = scale q . k_j + bias_j,   m = max s_j,   p_j = e^(s_j - m),   l = sum p_j,   output = sum p_j v_j / l
// block after block: where a later block raises m, what was summed before is multiplied by e^(old m - new m).
// Backward, with m and 1 / l kept from the forward, whose logarithm would be rounded:
//   p_j = e^(s_j - m) / l,   dp_j = grad . v_j,   ds_j = p_j (dp_j - delta),   delta = grad . output
//   grad_v_j = sum over queries of p_j grad,   grad_k_j = scale sum of ds_j q,   grad_q = scale sum of ds_j k_j
//
// Scores lie transposed, a row a key and a lane a query: maxima and sums over keys then need no lane of another. Every
// product is tile(): rows that are read a word at a time and broadcast, times rows of registers. A word is a float or,
// where the CPU multiplies pairs of bfloat16, two of those that follow each other in the dimension summed over.
//
// Every sum is taken in one order, whoever takes it: the result is the same for any number of threads.
#pragma once

#include "elementary.h"

namespace nnfast::NNFAST_ISA {

constexpr int64_t kBlock = Attention::kBlock, kLanes = lanes<f32v>;
#ifdef NNFAST_AVX512
constexpr int kTileRows = 6, kTileRegs = 4;  // 24 sums, 4 registers of columns and 1 word broadcast, of 32
#else
constexpr int kTileRows = 6, kTileRegs = 2;  // 12 + 2 + 1 of 16
#endif

// ---- how a product multiplies words ----

struct Floats {
  static constexpr int64_t per_word = 1;
  static NNFAST_MEMBER f32v multiply_add(f32v sum, f32v a, f32v b) { return a * b + sum; }
};
#ifdef NNFAST_AVX512_BF16
struct Bfloats {
  static constexpr int64_t per_word = 2;
  static NNFAST_MEMBER f32v multiply_add(f32v sum, f32v a, f32v b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a.r, (__m512bh)b.r);
  }
};
#endif
template <class T>
struct Product {
  using type = Floats;
};
#ifdef NNFAST_AVX512_BF16
template <>
struct Product<bf16> {
  using type = Bfloats;
};
#endif
template <class T>
constexpr bool kPaired = Product<T>::type::per_word == 2;

constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
template <class T>
int64_t words(int64_t n) {
  return kPaired<T> ? (n + 1) / 2 : n;
}

// Rows of words, `stride` apart.
struct Words {
  const float* p;
  int64_t stride;
  NNFAST_MEMBER Words from(int64_t row, int64_t column = 0) const { return {p + row * stride + column, stride}; }
};

enum class Into { set, add, scale };

// One tile: c[r][n] = sum over k of a(r, k) b[k][n], r < Rows, n < Regs registers; added to what is there, or to what
// is there times factors[r]. a(r, k) is a.p[r][k], or a.p[k][r] where it lies Across.
template <class Op, int Rows, int Regs, bool Across, Into into>
void tile(int64_t count, Words a, Words b, float* c, int64_t c_stride, const float* factors) {
  f32v sum[Rows][Regs];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < Regs; ++n) sum[r][n] = 0.0f;
  const int64_t row = Across ? 1 : a.stride, next = Across ? a.stride : 1;
  const float *a0 = a.p, *a3 = a.p + 3 * row, *bp = b.p;
  for (int64_t k = 0; k < count; ++k) {
    f32v column[Regs];
#pragma GCC unroll 8
    for (int n = 0; n < Regs; ++n) column[n] = load(bp + n * kLanes, Full<f32v>{});
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const f32v word = r < 3 ? a0[r * row] : a3[(r - 3) * row];
#pragma GCC unroll 8
      for (int n = 0; n < Regs; ++n) sum[r][n] = Op::multiply_add(sum[r][n], word, column[n]);
    }
    a0 += next, a3 += next, bp += b.stride;
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < Regs; ++n) {
      float* to = c + r * c_stride + n * kLanes;
      f32v v = sum[r][n];
      if constexpr (into == Into::add) v = v + load(to, Full<f32v>{});
      if constexpr (into == Into::scale) v = v + load(to, Full<f32v>{}) * f32v(factors[r]);
      store(to, v, Full<f32v>{});
    }
}

using Tile = void (*)(int64_t, Words, Words, float*, int64_t, const float*);
template <class Op, bool Across, Into into, int Rows>
constexpr Tile tile_of(int regs) {
  if constexpr (kTileRegs == 4) {
    if (regs == 4) return tile<Op, Rows, 4, Across, into>;
    if (regs == 3) return tile<Op, Rows, 3, Across, into>;
  }
  return regs == 2 ? tile<Op, Rows, 2, Across, into> : tile<Op, Rows, 1, Across, into>;
}
template <class Op, bool Across, Into into>
NNFAST_INLINE Tile tile_of(int64_t rows, int64_t regs) {
  switch (rows) {
    case 1: return tile_of<Op, Across, into, 1>(regs);
    case 2: return tile_of<Op, Across, into, 2>(regs);
    case 3: return tile_of<Op, Across, into, 3>(regs);
    case 4: return tile_of<Op, Across, into, 4>(regs);
    case 5: return tile_of<Op, Across, into, 5>(regs);
    default: return tile_of<Op, Across, into, 6>(regs);
  }
}

// c[r][columns] for r < rows, in tiles. span(r0, r1) says which k of rows r0 to r1 count: the others of a are zero.
template <class Op, bool Across, Into into, class Span>
NNFAST_INLINE void product_by_rows(
    int64_t rows, int64_t columns, Words a, Words b, float* c, int64_t c_stride, const float* factors, Span span) {
  for (int64_t n = 0; n < columns; n += kTileRegs * kLanes) {
    const int64_t regs = std::min<int64_t>(kTileRegs, (columns - n + kLanes - 1) / kLanes);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t here = std::min<int64_t>(kTileRows, rows - r);
      const auto [first, last] = span(r, r + here);
      tile_of<Op, Across, into>(here, regs)(
          last - first, Across ? a.from(first, r) : a.from(r, first), b.from(first, n), c + r * c_stride + n, c_stride,
          factors + (into == Into::scale ? r : 0));
    }
  }
}

// ---- how operands are laid out ----

// lo: the lanes of a whose number has no bit `step`, and between them those of b, each `step` to the right; hi: the
// rest. Over all steps this transposes as many registers as one has lanes.
template <int step>
NNFAST_INLINE void exchange(f32v& a, f32v& b) {
#ifdef NNFAST_AVX512
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(step));
  const __m512i from = _mm512_mask_add_epi32(lane, upper, lane, _mm512_set1_epi32(16 - step));
  const f32v lo = _mm512_permutex2var_ps(a, from, b);
  b = _mm512_permutex2var_ps(a, _mm512_add_epi32(from, _mm512_set1_epi32(step)), b);
  a = lo;
#else
  f32v lo;
  if constexpr (step == 1) {
    lo = _mm256_blend_ps(a, _mm256_moveldup_ps(b), 0xaa);
    b = _mm256_blend_ps(_mm256_movehdup_ps(a), b, 0xaa);
  } else if constexpr (step == 2) {
    lo = _mm256_shuffle_ps(a, b, 0x44);
    b = _mm256_shuffle_ps(a, b, 0xee);
  } else {
    lo = _mm256_permute2f128_ps(a, b, 0x20);
    b = _mm256_permute2f128_ps(a, b, 0x31);
  }
  a = lo;
#endif
}
template <int step>
NNFAST_INLINE void exchange_all(f32v (&r)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & step)) exchange<step>(r[i], r[i + step]);
}

// to[w][r] = rows[r][w], and 0 for r from `rows` up to whole registers. `to` has kBlock columns.
NNFAST_INLINE void turn(Words from, int64_t rows, int64_t width, float* to) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t w = 0; w < width; w += kLanes) {
      f32v reg[kLanes];
      const float* p = from.p + r * from.stride + w;
      const int64_t there = std::min(kLanes, rows - r), wide = std::min(kLanes, width - w);
      if (wide == kLanes && there == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) reg[i] = load(p + i * from.stride, Full<f32v>{});
      } else {
        for (int i = 0; i < kLanes; ++i) reg[i] = i < there ? load(p + i * from.stride, Tail<f32v>{wide}) : f32v(0.0f);
      }
      exchange_all<1>(reg);
      exchange_all<2>(reg);
      exchange_all<4>(reg);
#ifdef NNFAST_AVX512
      exchange_all<8>(reg);
#endif
      if (wide == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(to + (w + i) * kBlock + r, reg[i], Full<f32v>{});
      } else
        for (int i = 0; i < wide; ++i) store(to + (w + i) * kBlock + r, reg[i], Full<f32v>{});
    }
}

// Rows whose elements follow each other in a tensor.
template <class T>
struct Source {
  const T* p;
  int64_t stride;
};

// The rows as words, each to be broadcast: as they lie, or in `space`.
template <class T>
NNFAST_INLINE Words by_words(Source<T> from, int64_t rows, int64_t width, float* space) {
  const int64_t stride = padded(width);
  if constexpr (sizeof(T) == 4)
    return {(const float*)from.p, from.stride};
  else if constexpr (kPaired<T>) {
    if (width % 2 == 0 && from.stride % 2 == 0 && (uintptr_t)from.p % 4 == 0)
      return {(const float*)from.p, from.stride / 2};
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(space + r * stride, from.p + r * from.stride, width * sizeof(T));
      if (width % 2) ((T*)(space + r * stride))[width] = T{0};
    }
    return {space, stride};
  } else {
    for (int64_t r = 0; r < rows; ++r)
      sweep<float, f32v>(width, [&](int64_t i, auto part) NNFAST_LAMBDA {
        store(space + r * stride + i, load(from.p + r * from.stride + i, part), Full<f32v>{});
      });
    return {space, stride};
  }
}

// The rows as the dimension that is summed over: whole registers of words, and zero past the width. `wordy` is what
// by_words gave.
template <class T>
NNFAST_INLINE Words by_registers(Source<T> from, int64_t rows, int64_t width, Words wordy, float* space) {
  const int64_t stride = padded(width);
#ifdef NNFAST_AVX512_BF16
  if constexpr (kPaired<T>) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    // Word d: the upper row's element d above the lower one's.
    const __m512i left = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(32)), 16));
    const __m512i right = _mm512_add_epi16(left, _mm512_set1_epi16(16));
    for (int64_t r = 0; r < rows; r += 2) {
      const T *p = from.p + r * from.stride, *q = p + from.stride;
      float* to = space + r / 2 * stride;
      for (int64_t d = 0; d < width; d += 32) {
        const __mmask32 there = width - d >= 32 ? ~0u : (1u << (width - d)) - 1;
        const __m512i lower = _mm512_maskz_loadu_epi16(there, p + d);
        const __m512i upper = r + 1 < rows ? _mm512_maskz_loadu_epi16(there, q + d) : _mm512_setzero_si512();
        _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(lower, left, upper));
        if (d + 16 < width) _mm512_storeu_si512(to + d + 16, _mm512_permutex2var_epi16(lower, right, upper));
      }
    }
    return {space, stride};
  }
#endif
  if (sizeof(T) != 4 || width == stride) return wordy;
  for (int64_t r = 0; r < rows; ++r)
    sweep<float, f32v>(width, [&](int64_t i, auto part) NNFAST_LAMBDA {
      store(space + r * stride + i, load(wordy.p + r * wordy.stride + i, part), Full<f32v>{});
    });
  return {space, stride};
}

// Rows of a block of probabilities as words by which the sums over keys go: floats as they are, or the pairs of rows
// 2 i and 2 i + 1. A row has kBlock words.
template <class T>
NNFAST_INLINE void store_across(float* to, int64_t row, int64_t column, f32v p, f32v q) {
#ifdef NNFAST_AVX512_BF16
  if constexpr (kPaired<T>) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i both = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
    _mm512_storeu_si512(
        to + row / 2 * kBlock + column, _mm512_permutexvar_epi16(both, (__m512i)_mm512_cvtne2ps_pbh(q, p)));
    return;
  }
#endif
  store(to + row * kBlock + column, p, Full<f32v>{});
  store(to + (row + 1) * kBlock + column, q, Full<f32v>{});
}

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
  // Registers of queries, in lanes, that see any of the keys from `row` on.
  NNFAST_MEMBER int64_t first_column(int64_t row) const {
    return diagonal ? std::max<int64_t>(0, k0 + row - q0) / kLanes * kLanes : 0;
  }
  NNFAST_MEMBER int64_t columns() const { return padded(queries); }
};

// scores[key][query] = key . query, for the registers of queries that any key of a tile is seen by.
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

// v with its first `count` lanes, all of them from kLanes on, become `value`.
NNFAST_INLINE f32v before(f32v v, int64_t count, float value) {
  const auto n = (float)std::min(count, kLanes);
#ifdef NNFAST_AVX512
  const f32v lane = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  const f32v lane = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
#endif
  return if_negative(lane - n, f32v(value), v);
}

// The mask's part for this block, transposed as the scores are: what is added to a score, minus infinity where a
// boolean mask says no. `rows` is room for as much again.
NNFAST_INLINE void mask_row(const bool* mask, int64_t stride, int64_t n, float* row) {
  for (int64_t j = 0; j < n; ++j) row[j] = mask[j * stride] ? 0.0f : -INFINITY;
}
template <class M>
NNFAST_INLINE void mask_row(const M* mask, int64_t stride, int64_t n, float* row) {
  M gathered[kBlock];
  if (stride != 1) {
    for (int64_t j = 0; j < n; ++j) gathered[j] = mask[j * stride];
    mask = gathered;
  }
  sweep<float, f32v>(
      n, [&](int64_t j, auto part) NNFAST_LAMBDA { store(row + j, load(mask + j, part), Full<f32v>{}); });
}
template <class M>
NNFAST_INLINE void read_mask(const Attention& f, const M* mask, const Range& range, float* bias, float* rows) {
  const int64_t down = f.mask_strides[2], along = f.mask_strides[3];
  const M* p = mask + range.q0 * down + range.k0 * along;
  if (down == 0) {
    mask_row(p, along, range.keys, rows);
    for (int64_t j = 0; j < range.keys; ++j)
      for (int64_t n = 0; n < range.columns(); n += kLanes) store(bias + j * kBlock + n, f32v(rows[j]), Full<f32v>{});
    return;
  }
  for (int64_t i = 0; i < range.queries; ++i) mask_row(p + i * down, along, range.keys, rows + i * kBlock);
  turn({rows, kBlock}, range.queries, range.keys, bias);
}
NNFAST_INLINE void read_mask(const Attention& f, int64_t b, int64_t h, const Range& range, float* bias, float* rows) {
  const int64_t offset = b * f.mask_strides[0] + h * f.mask_strides[1];
  switch (f.mask_type) {
    case Attention::Mask::none: return;
    case Attention::Mask::boolean: return read_mask(f, (const bool*)f.mask + offset, range, bias, rows);
    case Attention::Mask::f32: return read_mask(f, (const float*)f.mask + offset, range, bias, rows);
    case Attention::Mask::bf16: return read_mask(f, (const bf16*)f.mask + offset, range, bias, rows);
    case Attention::Mask::f16: return read_mask(f, (const f16*)f.mask + offset, range, bias, rows);
  }
}

// scores = scores scale + bias, and 1 is then what they are still to be multiplied by. Without a mask the scale waits:
// it goes into the exponential, after the maximum is taken away.
NNFAST_INLINE void add_mask(const Attention& f, int64_t b, int64_t h, const Range& range, float* scores, float* bias) {
  read_mask(f, b, h, range, bias, bias + kBlock * kBlock);
  const f32v scale = (float)f.scale;
  for (int64_t j = 0; j < range.keys; ++j)
    for (int64_t n = range.first_column(j); n < range.columns(); n += kLanes) {
      f32v s = load(scores + j * kBlock + n, Full<f32v>{}) * scale;
      if (f.mask_type != Attention::Mask::none) s = s + load(bias + j * kBlock + n, Full<f32v>{});
      store(scores + j * kBlock + n, s, Full<f32v>{});
    }
}

template <class T>
NNFAST_INLINE Source<T> head(const Attention::Tensor& t, int64_t b, int64_t h, int64_t row) {
  return {(const T*)t.p + b * t.strides[0] + h * t.strides[1] + row * t.strides[2], t.strides[2]};
}
template <class T>
NNFAST_INLINE T* row_of(const Attention::Tensor& t, int64_t b, int64_t h, int64_t row) {
  return (T*)t.p + b * t.strides[0] + h * t.strides[1] + row * t.strides[2];
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

// Rows of the register of queries at `column` that some lane of it sees, and the first that some lane does not.
NNFAST_INLINE int64_t seen(const Range& range, int64_t column) {
  return range.diagonal ? std::min(range.keys, range.q0 + column + kLanes - range.k0) : range.keys;
}
// Scores from which no key is to be seen become minus infinity: where the causal order says so, and rows past the last
// key, up to a whole group of kGroup rows.
constexpr int64_t kGroup = 4;
NNFAST_INLINE int64_t groups_of(int64_t rows) { return (rows + kGroup - 1) / kGroup * kGroup; }
NNFAST_INLINE void hide(const Range& range, int64_t column, int64_t rows, float* scores) {
  if (range.diagonal)
    for (int64_t j = std::max<int64_t>(0, range.q0 + column + 1 - range.k0); j < rows; ++j) {
      float* s = scores + j * kBlock + column;
      store(s, before(load(s, Full<f32v>{}), range.k0 + j - range.q0 - column, -INFINITY), Full<f32v>{});
    }
  for (int64_t j = rows; j < groups_of(rows); ++j) store(scores + j * kBlock + column, f32v(-INFINITY), Full<f32v>{});
}
NNFAST_INLINE Quad<float> load_rows(const float* p) {
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

// The scores of a block become their probabilities times e^maximum, as T stores them, in `p`. maximum and sum, one a
// query, take them in, and factor is what all sums before are to be multiplied by. exp takes in what the scores are
// still to be multiplied by.
template <class T>
NNFAST_INLINE void softmax(
    const Range& range, const Exponential& exp, float* scores, float* p, float* maximum, float* sum, float* factor) {
  for (int64_t n = 0; n < range.columns(); n += kLanes) {
    const int64_t rows = seen(range, n), all = groups_of(range.keys);
    hide(range, n, rows, scores);
    const f32v most_before = load(maximum + n, Full<f32v>{});
    auto most_of = each_row(most_before);
    int64_t j = 0;
    // A NaN gives way here, and shows in the sum.
    for (; j < rows; j += kGroup) most_of = at_least(load_rows(scores + j * kBlock + n), most_of);
    const f32v most = at_least(at_least(most_of.lo.lo, most_of.lo.hi), at_least(most_of.hi.lo, most_of.hi.hi));
    // Where no key was seen yet, 0 is taken away instead, and e^(-infinity - 0) = 0.
    const f32v base = if_negative(most + 3.40282347e38f, f32v(0.0f), most);
    auto total = each_row(0.0f);
    for (j = 0; j < rows; j += kGroup) {
      const auto e = exp(load_rows(scores + j * kBlock + n) - each_row(base));
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

// What is added up over the keys that rows r0 to r1, queries here, see.
template <class T>
struct KeysSeen {
  const Range& range;
  NNFAST_MEMBER std::pair<int64_t, int64_t> operator()(int64_t, int64_t r1) const {
    return {0, words<T>(range.diagonal ? std::min(range.keys, range.q0 + r1 - range.k0) : range.keys)};
  }
};
// And over the queries that see the keys r0 to r1.
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
  turn(by_words<T>(head<T>(f.query, b, h, q0), queries, f.size, s.query_words), queries, e, s.queries);
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

// ---- backward ----

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

  // Block after block of queries: theirs and their gradients', turned and by rows; the statistics and delta.
  NNFAST_MEMBER void take_queries(int64_t q0, bool rows) {
    const int64_t queries = std::min(kBlock, f.queries - q0);
    const auto q = head<T>(f.query, b, h, q0), g = head<T>(f.grad_out, b, h, q0), o = head<T>(f.output, b, h, q0);
    const Words q_words = by_words<T>(q, queries, f.size, s.query_words);
    const Words g_words = by_words<T>(g, queries, f.value_size, s.grad_words);
    turn(q_words, queries, e, s.queries);
    turn(g_words, queries, ev, s.grads);
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
        const auto p = exp(load_rows(s.scores + j * kBlock + n) - most) * inverse;
        store_p(j, n, p, p * (load_rows(s.grad_p + j * kBlock + n) - delta));
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

  // The three gradients of a block, each added to what the blocks before it gave, the first one set.
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
  // Keys that no query sees.
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
