// LayerNorm on rows, forward and backward. The maths is in math/moments.h.
//
// A row is read from memory once: the later passes over it find it in cache. Forward moves 2 N elements a row
// (read x, write y), backward 3 N (read grad and x, write dx).
#pragma once

#include "../math/moments.h"
#include "simd.h"

namespace nnfast::NNFAST_ISA {

// R = 2 rows are taken together, side by side in a Pair, or R = 1. From the sum to the mean to the variance to the
// output, a short row is one chain of dependent steps; with two of them the CPU has something to do while each waits,
// and weight and bias are loaded, and their gradients stored, once for both.

// The value of each row.
template <class A, int R>
struct PerRow {
  A v[R];
  template <class V>  // for R = 2 the Pair of the rows
  NNFAST_MEMBER V as() const {
    if constexpr (R == 1)
      return typename V::scalar(v[0]);
    else
      return V(typename V::scalar(v[0]), typename V::scalar(v[1]));
  }
};

// Columns are taken two registers at a time for two rows, four for one.
template <class A, int R>
using Columns = std::conditional_t<R == 1, Quad<A>, Pair<Vec<A>>>;
// What part P is for R rows.
template <class P, int R>
using Block = std::conditional_t<R == 1, typename P::vec, Pair<typename P::vec>>;

template <int R, class T, class P>
NNFAST_INLINE Block<P, R> load_rows(const T* p, int64_t stride, P part) {
  if constexpr (R == 1)
    return load(p, part);
  else
    return {load(p, part), load(p + stride, part)};
}
template <int R, class T, class V, class P>
NNFAST_INLINE void store_rows(T* p, int64_t stride, V v, P part, bool past) {
  if constexpr (R == 1) {
    store(p, v, part, past);
  } else {
    store(p, v.lo, part, past);
    store(p + stride, v.hi, part, past);
  }
}
// So that no pass leaves the memory idle: the first asks for the rows after the next ones, the last for the next ones.
template <int R, int Ahead, class T, class P>
NNFAST_INLINE void prefetch_rows(const T* p, int64_t stride, P part) {
  for (int r = 0; r < R; ++r) prefetch(p + (R * Ahead + r) * stride, part);
}
// One row's value for all R, and the sum over the R rows.
template <int R, class V>
NNFAST_INLINE auto for_rows(V v) {
  if constexpr (R == 1)
    return v;
  else
    return Pair<V>(v, v);
}
template <int R, class V>
NNFAST_INLINE auto over_rows(V v) {
  if constexpr (R == 1)
    return v;
  else
    return v.lo + v.hi;
}
template <class P, int R, class V>
NNFAST_INLINE V keep_rows(V v, P part) {
  if constexpr (R == 1)
    return keep(v, part);
  else
    return {keep(v.lo, part), keep(v.hi, part)};
}

// A sum over each row.
template <class A, int R>
struct RowSum {
  Sum<A, Columns<A, R>> s[R];
  NNFAST_MEMBER RowSum() {}  // written out, so that it is built for this instruction set
  template <class V>
  NNFAST_MEMBER void operator+=(V v) {
    if constexpr (R == 1) {
      s[0] += v;
    } else {
      s[0] += v.lo;
      s[1] += v.hi;
    }
  }
  // Over `size`. In double, as all that happens once a row: an error here would be in every element of it.
  NNFAST_MEMBER PerRow<double, R> mean(int64_t size) const {
    PerRow<double, R> t;
    for (int r = 0; r < R; ++r) t.v[r] = (double)s[r].total() / (double)size;
    return t;
  }
};

// The sum of x / N, for a row whose sum overflowed. Hardly any row does, so it is a function apart.
template <class T>
double mean_of_large(const T* x, int64_t size) {
  using A = acc_t<T>;
  RowSum<A, 1> s;
  sweep<A>(size, [&](int64_t i, auto part) NNFAST_LAMBDA {
    s += load(x + i, part) * typename decltype(part)::vec(A(1) / (A)size);
  });
  return s.mean(1).v[0];
}

template <int R, class T, class W>
NNFAST_INLINE void layer_norm_rows(const LayerNormForward& f, int64_t row) {
  using A = acc_t<T>;
  const W *weight = (const W*)f.weight, *bias = (const W*)f.bias;
  const T* x = (const T*)f.input + row * f.input_stride;
  T* y = (T*)f.output + row * f.size;
  RowSum<A, R> s;
  sweep<A, Columns<A, R>>(f.size, [&](int64_t i, auto part) NNFAST_LAMBDA {
    s += load_rows<R>(x + i, f.input_stride, part);
    prefetch_rows<R, 2>(x + i, f.input_stride, part);
  });
  PerRow<double, R> mean = s.mean(f.size), rstd;
  for (int r = 0; r < R; ++r)
    if (!std::isfinite(mean.v[r])) mean.v[r] = mean_of_large(x + r * f.input_stride, f.size);

  RowSum<A, R> s1, s2;
  sweep<A, Columns<A, R>>(f.size, [&](int64_t i, auto part) NNFAST_LAMBDA {
    using P = decltype(part);
    using V = Block<P, R>;
    const V d = keep_rows<P, R>(load_rows<R>(x + i, f.input_stride, part) - mean.template as<V>(), part);
    s1 += d;
    s2 += d * d;
  });
  const PerRow<double, R> residual = s1.mean(f.size), square = s2.mean(f.size);
  for (int r = 0; r < R; ++r) {
    // The residual is relative to the mean rounded to A, which is what the subtraction above took. Of values whose
    // squares overflow it may not be known: rstd is then 0 in any case.
    const double rest = square.v[r] == INFINITY ? 0 : residual.v[r];
    mean.v[r] = (double)A(mean.v[r]) + rest;
    rstd.v[r] = reciprocal_std(corrected_variance(square.v[r], rest), f.eps);
    ((A*)f.mean)[row + r] = A(mean.v[r]);
    ((A*)f.rstd)[row + r] = A(rstd.v[r]);
  }

  sweep<A, Columns<A, R>>(f.size, [&](int64_t i, auto part) NNFAST_LAMBDA {
    using V = Block<decltype(part), R>;
    V v = normalized<V>(load_rows<R>(x + i, f.input_stride, part), mean.template as<V>(), rstd.template as<V>());
    if (weight) v = v * for_rows<R>(load(weight + i, part));
    if (bias) v = v + for_rows<R>(load(bias + i, part));
    prefetch_rows<R, 1>(x + i, f.input_stride, part);
    store_rows<R>(y + i, f.size, v, part, f.stream);
  });
}

template <int R, class T, class W>
NNFAST_INLINE void layer_norm_backward_rows(
    const LayerNormBackward& b, void* grad_weight, void* grad_bias, int64_t row) {
  using A = acc_t<T>;
  const W* weight = (const W*)b.weight;
  A *dw = (A*)grad_weight, *db = (A*)grad_bias;
  const T* g = (const T*)b.grad_out + row * b.grad_out_stride;
  const T* x = (const T*)b.input + row * b.input_stride;
  T* dx = (T*)b.grad_input + row * b.size;
  PerRow<A, R> mean, rstd;
  for (int r = 0; r < R; ++r) {
    mean.v[r] = ((const A*)b.mean)[row + r];
    rstd.v[r] = ((const A*)b.rstd)[row + r];
  }

  // Lanes past the end load zero gradients, so that they add nothing to any sum.
  RowSum<A, R> s1, s2;
  sweep<A, Columns<A, R>>(b.size, [&](int64_t i, auto part) NNFAST_LAMBDA {
    using V = Block<decltype(part), R>;
    const V grad = load_rows<R>(g + i, b.grad_out_stride, part);
    const V xhat =
        normalized<V>(load_rows<R>(x + i, b.input_stride, part), mean.template as<V>(), rstd.template as<V>());
    prefetch_rows<R, 2>(g + i, b.grad_out_stride, part);
    prefetch_rows<R, 2>(x + i, b.input_stride, part);
    if (dw) store(dw + i, load(dw + i, part) + over_rows<R>(grad * xhat), part);
    if (db) store(db + i, load(db + i, part) + over_rows<R>(grad), part);
    const V grad_xhat = weight ? grad * for_rows<R>(load(weight + i, part)) : grad;
    s1 += grad_xhat;
    s2 += grad_xhat * xhat;
  });
  if (!b.grad_input) return;

  const PerRow<double, R> m1 = s1.mean(b.size), m2 = s2.mean(b.size);
  sweep<A, Columns<A, R>>(b.size, [&](int64_t i, auto part) NNFAST_LAMBDA {
    using V = Block<decltype(part), R>;
    const V grad = load_rows<R>(g + i, b.grad_out_stride, part);
    const V xhat =
        normalized<V>(load_rows<R>(x + i, b.input_stride, part), mean.template as<V>(), rstd.template as<V>());
    const V grad_xhat = weight ? grad * for_rows<R>(load(weight + i, part)) : grad;
    prefetch_rows<R, 1>(g + i, b.grad_out_stride, part);
    prefetch_rows<R, 1>(x + i, b.input_stride, part);
    store_rows<R>(
        dx + i, b.size,
        layer_norm_grad_input<V>(grad_xhat, xhat, m1.template as<V>(), m2.template as<V>(), rstd.template as<V>()),
        part, b.stream);
  });
}

// Two at a time while rows are short: a long one keeps the CPU busy by itself, and two would split its memory traffic.
template <class T>
NNFAST_INLINE bool is_short(int64_t size) {
  return size * sizeof(T) <= 2048;
}

template <class T, class W>
void layer_norm_fwd_kernel(const LayerNormForward& f, int64_t begin, int64_t end) {
  if (is_short<T>(f.size))
    for (; begin + 2 <= end; begin += 2) layer_norm_rows<2, T, W>(f, begin);
  for (; begin < end; ++begin) layer_norm_rows<1, T, W>(f, begin);
  if (f.stream) _mm_sfence();
}

template <class T, class W>
void layer_norm_bwd_kernel(const LayerNormBackward& b, void* grad_weight, void* grad_bias, int64_t begin, int64_t end) {
  if (is_short<T>(b.size))
    for (; begin + 2 <= end; begin += 2) layer_norm_backward_rows<2, T, W>(b, grad_weight, grad_bias, begin);
  for (; begin < end; ++begin) layer_norm_backward_rows<1, T, W>(b, grad_weight, grad_bias, begin);
  if (b.stream) _mm_sfence();
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
