// Norms of a range of one tensor's elements, and their scaling. Bound by memory: 4 bytes an element in float.
#pragma once

#include "simd.h"

namespace nnfast::NNFAST_ISA {

// The lower and the upper half of v in double.
#ifdef NNFAST_AVX512
NNFAST_INLINE f64v lower(f32v v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
NNFAST_INLINE f64v upper(f32v v) {
  return _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
}
#else
NNFAST_INLINE f64v lower(f32v v) { return _mm256_cvtps_pd(_mm256_castps256_ps128(v)); }
NNFAST_INLINE f64v upper(f32v v) { return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)); }
#endif

// sums[k] += v^2, each register into sums of its own; the square of a float is exact in double.
NNFAST_INLINE void add_squares(f64v* sums, f64v v) { sums[0] = sums[0] + v * v; }
NNFAST_INLINE void add_squares(f64v* sums, f32v v) {
  const f64v a = lower(v), b = upper(v);
  sums[0] = sums[0] + a * a;
  sums[1] = sums[1] + b * b;
}
template <class V>
NNFAST_INLINE void add_squares(f64v* sums, Pair<V> v) {
  add_squares(sums, v.lo);
  add_squares(sums + 2 * sizeof(V) / sizeof(f32v), v.hi);
}

template <class T>
double sum_of_squares_kernel(const T* x, int64_t n) {
  f64v sums[8];
  for (auto& s : sums) s = f64v(0.0);
  sweep<acc_t<T>>(n, [&](int64_t i, auto part) NNFAST_LAMBDA { add_squares(sums, load(x + i, part)); });
  double total = 0;
  for (const auto& s : sums) total += sum(s);
  return total;
}
NNFAST_INLINE double sum_of_squares(DType dtype, const void* x, int64_t begin, int64_t end) {
  double total = 0;
  visit(dtype, [&](auto e) { total = sum_of_squares_kernel((const decltype(e)*)x + begin, end - begin); });
  return total;
}

NNFAST_INLINE f32v magnitude(f32v v) { return abs(v); }
NNFAST_INLINE f64v magnitude(f64v v) { return maximum(v, -v); }
template <class V>
NNFAST_INLINE Pair<V> magnitude(Pair<V> v) {
  return {magnitude(v.lo), magnitude(v.hi)};
}
// top = max(top, |v|), and NaN where either is.
template <class V>
NNFAST_INLINE void keep_largest(V& top, V v) {
  top = maximum(magnitude(v), top);
}
template <class V>
NNFAST_INLINE void keep_largest(Pair<V>& top, V v) {
  keep_largest(top.lo, v);
}
template <class V>
NNFAST_INLINE void keep_largest(Pair<Pair<V>>& top, V v) {
  keep_largest(top.lo.lo, v);
}

template <class T>
double largest_kernel(const T* x, int64_t n) {
  using A = acc_t<T>;
  Quad<A> top(A(0));
  sweep<A>(n, [&](int64_t i, auto part) NNFAST_LAMBDA { keep_largest(top, load(x + i, part)); });
  A lane[lanes<Quad<A>>], found = 0;
  store(lane, top, Full<Quad<A>>{});
  for (const A a : lane) found = a > found || a != a ? a : found;
  return found;
}
NNFAST_INLINE double largest(DType dtype, const void* x, int64_t begin, int64_t end) {
  double top = 0;
  visit(dtype, [&](auto e) { top = largest_kernel((const decltype(e)*)x + begin, end - begin); });
  return top;
}

// x[i] = x[i] factor
template <class T>
void scale_kernel(T* x, double factor, int64_t n) {
  sweep<acc_t<T>>(n, [&](int64_t i, auto part) NNFAST_LAMBDA {
    using V = typename decltype(part)::vec;
    store(x + i, load(x + i, part) * V(factor), part);
  });
}
NNFAST_INLINE void scale(DType dtype, void* x, double factor, int64_t begin, int64_t end) {
  visit(dtype, [&](auto e) { scale_kernel((decltype(e)*)x + begin, factor, end - begin); });
}

}  // namespace nnfast::NNFAST_ISA
