// Sums over rows, as for the gradient of a Linear's bias, and what RowSums does with them.
#pragma once

#include "simd.h"

namespace nnfast::NNFAST_ISA {

// sums[i] += the sum of rows[r][i]. Four rows at a time, so that the sums are loaded and stored a fourth as often.
template <class T>
void sum_rows_kernel(const void* rows, int64_t stride, int64_t size, void* sums, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  A* const sum = (A*)sums;
  int64_t row = begin;
  for (; row + 4 <= end; row += 4) {
    const T *a = (const T*)rows + row * stride, *b = a + stride, *c = b + stride, *d = c + stride;
    sweep<A>(size, [&](int64_t i, auto part) NNFAST_LAMBDA {
      const auto four = (load(a + i, part) + load(b + i, part)) + (load(c + i, part) + load(d + i, part));
      store(sum + i, load(sum + i, part) + four, part);
    });
  }
  for (; row < end; ++row) {
    const T* a = (const T*)rows + row * stride;
    sweep<A>(size, [&](int64_t i, auto part) NNFAST_LAMBDA {
      store(sum + i, load(sum + i, part) + load(a + i, part), part);
    });
  }
}

NNFAST_INLINE void sum_rows(
    DType dtype, const void* rows, int64_t stride, int64_t size, void* sums, int64_t begin, int64_t end) {
  visit(dtype, [&](auto t) { sum_rows_kernel<decltype(t)>(rows, stride, size, sums, begin, end); });
}

// to += from; from = 0.
NNFAST_INLINE void move_sums(DType dtype, void* to, void* from, int64_t size) {
  visit(dtype, [&](auto t) {
    using A = acc_t<decltype(t)>;
    A *a = (A*)to, *b = (A*)from;
    sweep<A>(size, [&](int64_t i, auto part) NNFAST_LAMBDA {
      store(a + i, load(a + i, part) + load(b + i, part), part);
      store(b + i, typename decltype(part)::vec(A(0)), part);
    });
  });
}

// The threads' partial sums, in the accumulation type of `out`, added up in order.
NNFAST_INLINE void sum_parts(DType out_dtype, const void* parts, int64_t count, int64_t size, void* out) {
  visit(out_dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    sweep<A>(size, [&](int64_t i, auto part) NNFAST_LAMBDA {
      auto total = load((const A*)parts + i, part);
      for (int64_t k = 1; k < count; ++k) total = total + load((const A*)parts + k * size + i, part);
      store((T*)out + i, total, part);
    });
  });
}

}  // namespace nnfast::NNFAST_ISA
