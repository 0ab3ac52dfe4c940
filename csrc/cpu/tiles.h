// Products in registers, a tile at a time, and how the operands are laid out for them: for attention (attention.h) and
// for matrices (gemm.h).
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

// c[r][columns] for r < rows, in tiles. span(r0, r1) says which k count for rows r0 to r1: elsewhere a is zero.
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

// For each lane i without the bit `step`, j = i + step: a[j] and b[i] change places. Over all steps this transposes as
// many registers as one has lanes.
template <int step>
NNFAST_INLINE void exchange(f32v& a, f32v& b) {
#ifdef NNFAST_AVX512
  const __m512i lane = lane_numbers();
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

// to[w][r] = from[r][w], and 0 for r from `rows` up to whole registers. `to` has `to_stride` columns: where those are
// fewer than the registers write, each row overwrites what the one before it wrote too far.
template <int64_t to_stride = kBlock, class T>
NNFAST_INLINE void transpose(const T* from, int64_t stride, int64_t rows, int64_t width, float* to) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t w = 0; w < width; w += kLanes) {
      f32v reg[kLanes];
      const T* p = from + r * stride + w;
      const int64_t there = std::min(kLanes, rows - r), wide = std::min(kLanes, width - w);
      if (wide == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) reg[i] = i < there ? load(p + i * stride, Full<f32v>{}) : f32v(0.0f);
      } else {
        for (int i = 0; i < kLanes; ++i) reg[i] = i < there ? load(p + i * stride, Tail<f32v>{wide}) : f32v(0.0f);
      }
      exchange_all<1>(reg);
      exchange_all<2>(reg);
      exchange_all<4>(reg);
#ifdef NNFAST_AVX512
      exchange_all<8>(reg);
#endif
      if (wide == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(to + (w + i) * to_stride + r, reg[i], Full<f32v>{});
      } else
        for (int i = 0; i < wide; ++i) store(to + (w + i) * to_stride + r, reg[i], Full<f32v>{});
    }
}

NNFAST_INLINE void transpose(Words from, int64_t rows, int64_t width, float* to) {
  transpose(from.p, from.stride, rows, width, to);
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

// The rows as b of a tile, which sums over them: whole registers of words, and zero past the width. `wordy` is what
// by_words gave.
template <class T>
NNFAST_INLINE Words by_registers(Source<T> from, int64_t rows, int64_t width, Words wordy, float* space) {
  const int64_t stride = padded(width);
#ifdef NNFAST_AVX512_BF16
  if constexpr (kPaired<T>) {
    const __m512i lane = lane_numbers();
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

// Two rows of probabilities, which are keys, as a of a tile that sums over keys: floats as they are, or in one row of
// words, each a pair of the two rows. A row has kBlock words.
template <class T>
NNFAST_INLINE void store_across(float* to, int64_t row, int64_t column, f32v p, f32v q) {
#ifdef NNFAST_AVX512_BF16
  if constexpr (kPaired<T>) {
    const __m512i lane = lane_numbers();
    const __m512i both = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
    _mm512_storeu_si512(
        to + row / 2 * kBlock + column, _mm512_permutexvar_epi16(both, (__m512i)_mm512_cvtne2ps_pbh(q, p)));
    return;
  }
#endif
  store(to + row * kBlock + column, p, Full<f32v>{});
  store(to + (row + 1) * kBlock + column, q, Full<f32v>{});
}

}  // namespace nnfast::NNFAST_ISA
