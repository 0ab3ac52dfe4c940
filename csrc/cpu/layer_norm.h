// LayerNorm on rows, forward and backward. The maths is in math/moments.h.
//
// A row is read from memory once: the later passes over it find it in cache. Forward moves 2 N elements a row
// (read x, write y), backward 3 N (read grad and x, write dx).
#pragma once

#include "../math/moments.h"
#include "simd.h"

namespace nnfast::NNFAST_ISA {

template <class A>
struct Moments {
  A mean, rstd;
};

template <class A, class T>
NNFAST_INLINE Moments<A> moments(const T* x, int64_t size, A eps) {
  Sum<A> s;
  sweep<A>(size, [&](int64_t i, auto part) NNFAST_LAMBDA { s += load(x + i, part); });
  const A mean = s.total() / A(size);

  Sum<A> s1, s2;
  sweep<A>(size, [&](int64_t i, auto part) NNFAST_LAMBDA {
    const auto d = keep(load(x + i, part) - mean, part);
    s1 += d;
    s2 += d * d;
  });
  const A residual = s1.total();
  return {mean + residual / A(size), reciprocal_std(corrected_variance(s2.total(), residual, A(size)), eps)};
}

template <class T, class W>
void layer_norm_fwd_kernel(const LayerNormForward& f, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const W *weight = (const W*)f.weight, *bias = (const W*)f.bias;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)f.input + row * f.input_stride;
    T* y = (T*)f.output + row * f.size;
    const Moments<A> m = moments<A>(x, f.size, A(f.eps));
    ((A*)f.mean)[row] = m.mean;
    ((A*)f.rstd)[row] = m.rstd;
    sweep<A>(f.size, [&](int64_t i, auto part) NNFAST_LAMBDA {
      using V = typename decltype(part)::vec;
      V v = normalized<V>(load(x + i, part), m.mean, m.rstd);
      if (weight) v = v * load(weight + i, part);
      if (bias) v = v + load(bias + i, part);
      store(y + i, v, part);
    });
  }
}

template <class T, class W>
void layer_norm_bwd_kernel(const LayerNormBackward& b, void* grad_weight, void* grad_bias, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const W* weight = (const W*)b.weight;
  A *dw = (A*)grad_weight, *db = (A*)grad_bias;
  for (int64_t row = begin; row < end; ++row) {
    const T* g = (const T*)b.grad_out + row * b.grad_out_stride;
    const T* x = (const T*)b.input + row * b.input_stride;
    const A mean = ((const A*)b.mean)[row], rstd = ((const A*)b.rstd)[row];
    // Lanes past the end load zero gradients, so that they add nothing to any sum.
    Sum<A> s1, s2;
    sweep<A>(b.size, [&](int64_t i, auto part) NNFAST_LAMBDA {
      using V = typename decltype(part)::vec;
      const V grad = load(g + i, part), xhat = normalized<V>(load(x + i, part), mean, rstd);
      if (dw) store(dw + i, grad * xhat + load(dw + i, part), part);
      if (db) store(db + i, grad + load(db + i, part), part);
      const V grad_xhat = weight ? grad * load(weight + i, part) : grad;
      s1 += grad_xhat;
      s2 += grad_xhat * xhat;
    });
    if (!b.grad_input) continue;
    T* dx = (T*)b.grad_input + row * b.size;
    const A m1 = s1.total() / A(b.size), m2 = s2.total() / A(b.size);
    sweep<A>(b.size, [&](int64_t i, auto part) NNFAST_LAMBDA {
      using V = typename decltype(part)::vec;
      const V grad = load(g + i, part), xhat = normalized<V>(load(x + i, part), mean, rstd);
      const V grad_xhat = weight ? grad * load(weight + i, part) : grad;
      store(dx + i, layer_norm_grad_input<V>(grad_xhat, xhat, m1, m2, rstd), part);
    });
  }
}

// weight has x's type, or is float where x has 16 bits.
NNFAST_INLINE void layer_norm_fwd(const LayerNormForward& f, int64_t begin, int64_t end) {
  visit(
      f.dtype, f.weight_dtype, [&](auto t, auto w) { layer_norm_fwd_kernel<decltype(t), decltype(w)>(f, begin, end); });
}
NNFAST_INLINE void layer_norm_bwd(const LayerNormBackward& b, void* dw, void* db, int64_t begin, int64_t end) {
  visit(b.dtype, b.weight_dtype, [&](auto t, auto w) {
    layer_norm_bwd_kernel<decltype(t), decltype(w)>(b, dw, db, begin, end);
  });
}

}  // namespace nnfast::NNFAST_ISA
