// The product of two matrices of 16 bits, for where no library at hand makes it well: a CPU with AVX2 alone, for which
// oneDNN has no kernels of them.
//
// Scalar math: c[i][j] = bias[j] + sum over k of a[i][k] b[j][k]
// in blocks, as Goto and van de Geijn have it (Anatomy of High-Performance Matrix Multiplication, 2008): a block of k
// of some columns of b is laid out so that kPanel columns lie side by side, kTileRows rows of a likewise, and tile()
// reads both one after another. 16 bits become float as they are laid out. Blocks of k are added up in their order,
// whoever takes them: the result is the same for any number of threads.
#pragma once

#include "tiles.h"

namespace nnfast::NNFAST_ISA {

constexpr int64_t kPanel = kTileRegs * kLanes;

// to[k][r] = from[r][k] for `rows` rows, with room for `stride` of them side by side in `to`; what is written beyond
// them does not matter. `there`: how many rows may be read.
template <int64_t stride, class T>
NNFAST_INLINE void pack(
    const T* from, const int64_t (&strides)[2], int64_t rows, int64_t there, int64_t depth, float* to) {
  if (strides[1] == 1) return transpose<stride>(from, strides[0], rows, depth, to);
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t r = 0; r < rows; r += kLanes) {
      const T* p = from + k * strides[1] + r;
      const f32v v = there - r >= kLanes ? load(p, Full<f32v>{}) : load(p, Tail<f32v>{std::min(rows - r, kLanes)});
      store(to + k * stride + r, v, Full<f32v>{});
    }
}

NNFAST_INLINE void gemm_pack(const Gemm& f, const GemmPart& part, float* b) {
  visit(f.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (sizeof(T) == 2)
      for (int64_t n = part.column; n < part.column + part.columns; n += kPanel, b += kPanel * part.depth) {
        const T* from = (const T*)f.b.p + n * f.b.strides[0] + part.k0 * f.b.strides[1];
        pack<kPanel>(from, f.b.strides, std::min(kPanel, f.n - n), f.n - n, part.depth, b);
      }
  });
}

// c[r][j] = sums[r][j] + bias[j]
template <class T, class Out>
NNFAST_INLINE void gemm_write(const Gemm& f, const GemmPart& part, const float* sums, int64_t stride) {
  const T* const bias = f.bias ? (const T*)f.bias + part.column : nullptr;
  for (int64_t r = 0; r < part.rows; ++r) {
    Out* const to = (Out*)f.c + (part.row + r) * f.n + part.column;
    sweep<float>(part.columns, [&](int64_t i, auto at) NNFAST_LAMBDA {
      const auto sum = load(sums + r * stride + i, at);
      store(to + i, bias ? sum + load(bias + i, at) : sum, at);
    });
  }
}

template <class T>
NNFAST_INLINE void gemm_rows(
    const Gemm& f, const GemmPart& part, const float* b, float* sums, int64_t stride, float* a) {
  for (int64_t r = 0; r < part.rows; r += kTileRows) {
    const int64_t row = part.row + r, here = std::min<int64_t>(kTileRows, part.rows - r);
    const T* from = (const T*)f.a.p + row * f.a.strides[0] + part.k0 * f.a.strides[1];
    pack<kTileRows>(from, f.a.strides, here, f.m - row, part.depth, a + r * part.depth);
  }
  for (int64_t n = 0; n < part.columns; n += kPanel) {
    const int64_t regs = std::min<int64_t>(kTileRegs, (part.columns - n + kLanes - 1) / kLanes);
    for (int64_t r = 0; r < part.rows; r += kTileRows) {
      const int64_t here = std::min<int64_t>(kTileRows, part.rows - r);
      const Tile multiply =
          part.k0 ? tile_of<Floats, true, Into::add>(here, regs) : tile_of<Floats, true, Into::set>(here, regs);
      multiply(
          part.depth, {a + r * part.depth, kTileRows}, {b + n * part.depth, kPanel}, sums + r * stride + n, stride,
          nullptr);
    }
  }
  if (part.k0 + part.depth < f.k) return;
  if (f.out_dtype == DType::f32) return gemm_write<T, float>(f, part, sums, stride);
  gemm_write<T, T>(f, part, sums, stride);
}

NNFAST_INLINE void gemm(const Gemm& f, const GemmPart& part, const float* b, float* sums, int64_t stride, float* a) {
  visit(f.dtype, [&](auto t) {
    if constexpr (sizeof(t) == 2) gemm_rows<decltype(t)>(f, part, b, sums, stride, a);
  });
}

}  // namespace nnfast::NNFAST_ISA
