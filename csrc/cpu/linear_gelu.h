// The elementwise parts of Linear+GELU; product.cpp chooses who multiplies. The maths is in math/gelu.h.
#pragma once

#include "elementary.h"

namespace nnfast::NNFAST_ISA {

template <class T, bool Tanh>
void gelu_fwd_kernel(const Gelu& f, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* x = (const T*)f.input + begin;
  T *y = (T*)f.output + begin, *copy = f.copy ? (T*)f.copy + begin : nullptr;
  sweep<A>(end - begin, [&](int64_t i, auto part) NNFAST_LAMBDA {
    const auto v = load(x + i, part);
    if (copy) store(copy + i, v, part, f.stream);
    store(y + i, gelu<Tanh, A>(v), part, f.stream);
  });
  if (f.stream) _mm_sfence();
}

// The bias gradient sums what is stored: grad_pre rounded to its type, as the GEMMs of the backward see it.
template <class T, bool Tanh>
void gelu_bwd_kernel(const GeluBackward& b, void* grad_bias, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  A* db = (A*)grad_bias;
  // Without a sum over rows there are no rows: all the elements are one run.
  const int64_t size = db ? b.size : b.size * (end - begin), runs = db ? end - begin : 1;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t offset = begin * b.size + run * size;
    const T *g = (const T*)b.grad_out + offset, *pre = (const T*)b.pre + offset;
    T* d = (T*)b.grad_pre + offset;
    sweep<A>(size, [&](int64_t i, auto part) NNFAST_LAMBDA {
      const auto grad = rounded<T>(load(g + i, part) * gelu_grad<Tanh, A>(load(pre + i, part)));
      store(d + i, grad, part);
      if (db) store(db + i, load(db + i, part) + grad, part);
    });
  }
}

// Of float and 16 bits: doubles are ATen's.
NNFAST_INLINE void gelu_fwd(const Gelu& f, int64_t begin, int64_t end) {
  visit(f.dtype, [&](auto t) {
    if constexpr (!std::is_same_v<decltype(t), double>)
      (f.tanh ? gelu_fwd_kernel<decltype(t), true> : gelu_fwd_kernel<decltype(t), false>)(f, begin, end);
  });
}
NNFAST_INLINE void gelu_bwd(const GeluBackward& b, void* grad_bias, int64_t begin, int64_t end) {
  visit(b.dtype, [&](auto t) {
    if constexpr (!std::is_same_v<decltype(t), double>)
      (b.tanh ? gelu_bwd_kernel<decltype(t), true> : gelu_bwd_kernel<decltype(t), false>)(b, grad_bias, begin, end);
  });
}

}  // namespace nnfast::NNFAST_ISA
