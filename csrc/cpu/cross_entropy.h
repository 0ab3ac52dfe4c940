// Cross-entropy on rows of logits, forward and backward. The maths is in math/cross_entropy.h.
//
// Forward reads the logits from memory once, in chunks that stay in the first cache: one pass for their largest, one
// for the sum of their exponentials. Backward reads them once more and writes the gradient, which may be where the
// logits are. What happens once a row is done in double: an error there would be in every element of it.
#pragma once

#include "../math/cross_entropy.h"
#include "elementary.h"

namespace nnfast::NNFAST_ISA {

constexpr int64_t kLogitChunk = 2048;

// The first element alone, and as a scalar: the lanes beside it are zero.
template <class A>
using First = Tail<Vec<A>>;
template <class A, class T>
NNFAST_INLINE double value(const T* p) {
  return sum(load(p, First<A>{1}));
}

template <class T>
NNFAST_INLINE void cross_entropy_row(const CrossEntropyForward& f, int64_t row) {
  using A = acc_t<T>;
  const T* x = (const T*)f.input + row * f.input_stride;
  const A* weight = (const A*)f.weight;
  double max = -INFINITY, total = 0;       // total = sum of exp(x_c - max)
  double weights = 0, weighted_below = 0;  // sums of w_c and of w_c (max - x_c)
  for (int64_t begin = 0; begin < f.size; begin += kLogitChunk) {
    const int64_t count = f.size - begin < kLogitChunk ? f.size - begin : kLogitChunk;
    const T* p = x + begin;
    Largest<A> top;
    sweep<A>(count, [&](int64_t i, auto part) NNFAST_LAMBDA {
      using V = typename decltype(part)::vec;
      top.take(keep(load(p + i, part), part, V(A(-INFINITY))));
    });
    const double before = max, found = top.total();
    if (found > max) max = found;
    // Where there was nothing but -inf yet, exp(-inf - base) shall be 0. A NaN goes into the sum.
    const A base = max == -INFINITY ? A(0) : A(max);
    Sum<A> s;
    sweep<A>(count, [&](int64_t i, auto part) NNFAST_LAMBDA {
      using V = typename decltype(part)::vec;
      s += keep(exp(load(p + i, part) - V(base)), part);
      prefetch(p + i + kLogitChunk, part);
    });
    total = rebased(total, before, max) + (double)s.total();
    if (f.smoothing == 0) continue;
    Sum<A> below, w;
    sweep<A>(count, [&](int64_t i, auto part) NNFAST_LAMBDA {
      using V = typename decltype(part)::vec;
      const V b = V(base) - load(p + i, part);
      below += keep(weight ? b * load(weight + begin + i, part) : b, part);
      if (weight) w += load(weight + begin + i, part);
    });
    if (weights != 0 && before != max) weighted_below += (max - before) * weights;
    weighted_below += (double)below.total();
    weights += weight ? (double)w.total() : (double)count;
  }
  if (max == -INFINITY) total = NAN;  // as -inf - -inf is
  ((A*)f.max)[row] = A(max);
  ((A*)f.sum)[row] = A(total);
  const int64_t y = f.target[row];
  double loss = 0;
  if (y != f.ignore_index) {
    const double log_sum = std::log(total);
    loss = cross_entropy(
        negative_log_softmax(value<A>(x + y), max, log_sum), weight ? (double)weight[y] : 1.0,
        log_sum * weights + weighted_below, f.smoothing, (double)f.size);
  }
  ((A*)f.loss)[row] = A(loss);
}

template <class T>
NNFAST_INLINE void cross_entropy_backward_row(const CrossEntropyBackward& b, int64_t row) {
  using A = acc_t<T>;
  const T* x = (const T*)b.input + row * b.input_stride;
  T* dx = (T*)b.grad_input + row * b.size;
  const A* weight = (const A*)b.weight;
  const int64_t y = b.target[row];
  const double max = ((const A*)b.max)[row], total = ((const A*)b.sum)[row];
  // An ignored row has no gradient, unless there is a NaN in it, which shows in all of it.
  CrossEntropyScales<double> s{0, 0, 0 / total};
  if (y != b.ignore_index)
    s = cross_entropy_scales(
        (double)((const A*)b.grad)[row * b.grad_stride] / b.total_weight, weight ? (double)weight[y] : 1.0,
        b.all_weights, (double)b.size, b.smoothing, total);
  const A scale = A(s.softmax), smooth = A(s.b);
  const auto grad = [&](const T* p, int64_t i, auto part) NNFAST_LAMBDA {
    using V = typename decltype(part)::vec;
    const V v = exp(load(p, part) - V(A(max))) * V(scale);
    if (smooth == 0) return v;
    return v - (weight ? load(weight + i, part) * V(smooth) : V(smooth));
  };
  // The class is put right at the end; its logit may be gone by then.
  const bool ignored = y == b.ignore_index;
  const Vec<A> at_y = ignored ? Vec<A>(A(0)) : grad(x + y, y, First<A>{1}) - Vec<A>(A(s.a));
  sweep_lines<A>(dx, b.size, b.stream, [&](int64_t i, auto part, bool past) NNFAST_LAMBDA {
    store(dx + i, grad(x + i, i, part), part, past);
  });
  if (ignored) return;
  if (b.stream) _mm_sfence();
  store(dx + y, at_y, First<A>{1});
}

NNFAST_INLINE void cross_entropy_fwd(const CrossEntropyForward& f, int64_t begin, int64_t end) {
  visit(f.dtype, [&](auto t) {
    for (; begin < end; ++begin) cross_entropy_row<decltype(t)>(f, begin);
  });
}
NNFAST_INLINE void cross_entropy_bwd(const CrossEntropyBackward& b, int64_t begin, int64_t end) {
  visit(b.dtype, [&](auto t) {
    for (; begin < end; ++begin) cross_entropy_backward_row<decltype(t)>(b, begin);
  });
}

}  // namespace nnfast::NNFAST_ISA
