// Cross-entropy on rows of logits, forward and backward. The maths is in math/cross_entropy.h.
//
// Forward reads the logits from memory once, in chunks that stay in the first cache: one pass for their largest, one
// for the sum of their exponentials. Backward reads them once more and writes the gradient, which may be where the
// logits are. What happens once a row is done in double: an error there would be in every element of it.
#pragma once

#include "../math/cross_entropy.h"
#include "tiles.h"

namespace nnfast::NNFAST_ISA {

constexpr int64_t kLogitChunk = 2048;

// The part that is the first element alone, with zero in the other lanes; value() gives it as a scalar.
template <class A>
using First = Tail<Vec<A>>;
template <class A, class T>
NNFAST_INLINE double value(const T* p) {
  if constexpr (std::is_same_v<A, T>) return *p;
  return sum(load(p, First<A>{1}));
}

// log x for x >= 1, to 1e-13: enough for what is rounded to a float, and no call of the library's. Scalar math:
// x = 2^e m, sqrt(1/2) <= m < sqrt(2), z = (m - 1) / (m + 1), log x = e log 2 + 2 (z + z^3 / 3 + z^5 / 5 + ...).
NNFAST_INLINE double log_from_one(double x, float) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  constexpr int64_t kHalf = 0x3fe6a09e667f3bcd;  // the bits of sqrt(1/2)
  const int64_t e = (bits - kHalf) >> 52;
  bits -= e << 52;
  double m;
  std::memcpy(&m, &bits, sizeof m);
  const double z = (m - 1) / (m + 1), s = z * z;
  double p = s * (1.0 / 15) + 1.0 / 13;
  for (const double c : {1.0 / 11, 1.0 / 9, 1.0 / 7, 1.0 / 5, 1.0 / 3, 1.0}) p = p * s + c;
  return x == x ? (double)e * 0.6931471805599453 + 2 * z * p : x;
}
NNFAST_INLINE double log_from_one(double x, double) { return std::log(x); }

// The largest of a run, -inf of an empty one; a NaN is passed over.
template <class A, class Wide = Quad<A>>
struct Largest {
  Wide m;
  NNFAST_MEMBER Largest() : m(A(-INFINITY)) {}
  // The second operand of at_least stays where the first is NaN.
  NNFAST_MEMBER void take(Wide v) { m = at_least(v, m); }
  NNFAST_MEMBER void take(Vec<A> v) { m = at_least(Wide(Pair<Vec<A>>(v, v), Pair<Vec<A>>(v, v)), m); }
  NNFAST_MEMBER A total() const { return largest(at_least(at_least(m.lo.lo, m.lo.hi), at_least(m.hi.lo, m.hi.hi))); }
};

// body(i, part, past) over a run that is written to p: as sweep, and with `past` where `stream` says so and p + i is on
// a line.
template <class A, class T, class Body>
NNFAST_INLINE void sweep_lines(const T* p, int64_t n, bool stream, Body body) {
  int64_t head = stream ? (int64_t)(-(uintptr_t)p % 64 / sizeof(T)) : 0;
  if (head > n) head = n;
  if (head) sweep<A>(head, [&](int64_t i, auto part) NNFAST_LAMBDA { body(i, part, false); });
  sweep<A>(n - head, [&](int64_t i, auto part) NNFAST_LAMBDA { body(head + i, part, stream); });
}

// Running sums of a row: over the logits read so far, and in the end over all.
struct RowOfLogits {
  double max = -INFINITY, total = 0;       // total = sum of exp(x_c - max)
  double weights = 0, weighted_below = 0;  // sums of w_c and of w_c (max - x_c)
  double before;                           // max without the chunk at hand
};

// So many short rows go through each step together: a row alone would wait at each for the step before it.
constexpr int64_t kLogitRows = 32;

// logit(y): the logit of the row's class.
template <class A, class Logit>
NNFAST_INLINE void finish_row(const CrossEntropyForward& f, int64_t row, RowOfLogits r, Logit logit) {
  const A* weight = (const A*)f.weight;
  if (r.max == -INFINITY) r.total = NAN;  // as -inf - -inf is
  const int64_t y = f.target[row];
  const double log_sum = log_from_one(r.total, A());
  double loss = 0;
  if (y != f.ignore_index)
    loss = cross_entropy(
        negative_log_softmax(logit(y), r.max, log_sum), weight ? (double)weight[y] : 1.0,
        log_sum * r.weights + r.weighted_below, f.smoothing, (double)f.size);
  ((A*)f.max)[row] = A(r.max);
  ((A*)f.sum)[row] = A(r.total);
  ((A*)f.loss)[row] = A(loss);
}

template <class T>
NNFAST_INLINE void cross_entropy_rows(const CrossEntropyForward& f, int64_t first, int64_t rows) {
  using A = acc_t<T>;
  const A* weight = (const A*)f.weight;
  const auto logits = [&](int64_t row) { return (const T*)f.input + (first + row) * f.input_stride; };
  RowOfLogits found[kLogitRows];
  // Where all logits were -inf so far, base is 0, so that exp(-inf - base) is 0. A NaN shows in the sum.
  const auto base = [](const RowOfLogits& r) { return r.max == -INFINITY ? A(0) : A(r.max); };
  for (int64_t begin = 0; begin < f.size; begin += kLogitChunk) {
    const int64_t count = f.size - begin < kLogitChunk ? f.size - begin : kLogitChunk;
    for (int64_t row = 0; row < rows; ++row) {
      const T* p = logits(row) + begin;
      Largest<A> top;
      sweep<A>(count, [&](int64_t i, auto part) NNFAST_LAMBDA {
        using V = typename decltype(part)::vec;
        top.take(keep(load(p + i, part), part, V(A(-INFINITY))));
      });
      auto& r = found[row];
      const double here = top.total();
      r.before = r.max;
      r.max = here > r.max ? here : r.max;
    }
    for (int64_t row = 0; row < rows; ++row) {
      const T* p = logits(row) + begin;
      auto& r = found[row];
      const A b = base(r);
      Sum<A> s;
      sweep<A>(count, [&](int64_t i, auto part) NNFAST_LAMBDA {
        using V = typename decltype(part)::vec;
        s += keep(exp(load(p + i, part) - V(b)), part);
        prefetch(p + i + kLogitChunk, part);
      });
      r.total = rebased(r.total, r.before, r.max) + (double)s.total();
    }
    for (int64_t row = 0; row < rows && f.smoothing != 0; ++row) {
      const T* p = logits(row) + begin;
      auto& r = found[row];
      const A from = base(r);
      Sum<A> below, w;
      sweep<A>(count, [&](int64_t i, auto part) NNFAST_LAMBDA {
        using V = typename decltype(part)::vec;
        const V b = V(from) - load(p + i, part);
        below += keep(weight ? b * load(weight + begin + i, part) : b, part);
        if (weight) w += load(weight + begin + i, part);
      });
      if (r.weights != 0 && r.before != r.max) r.weighted_below += (r.max - r.before) * r.weights;
      r.weighted_below += (double)below.total();
      r.weights += weight ? (double)w.total() : (double)count;
    }
  }
  for (int64_t row = 0; row < rows; ++row)
    finish_row<A>(f, first + row, found[row], [&](int64_t y) { return value<A>(logits(row) + y); });
}

// What a row's gradient is made of. An ignored row has none, unless there is a NaN in it, which shows in all of it.
template <class A>
NNFAST_INLINE CrossEntropyScales<double> scales_of_row(const CrossEntropyBackward& b, int64_t row) {
  const double total = ((const A*)b.sum)[row];
  const int64_t y = b.target[row];
  if (y == b.ignore_index) return {0, 0, 0 / total};
  return cross_entropy_scales(
      (double)((const A*)b.grad)[row * b.grad_stride] / b.total_weight,
      b.weight ? (double)((const A*)b.weight)[y] : 1.0, b.all_weights, (double)b.size, b.smoothing, total);
}

// Whether the logits of a row are those of the forward: `total` is the sum of their exponentials now. A sum of a
// million of them in float, 32 side by side, is off by less than the bound.
template <class A>
NNFAST_INLINE void compare_sum(const CrossEntropyBackward& b, int64_t row, double total) {
  const double before = ((const A*)b.sum)[row];
  if (b.target[row] != b.ignore_index && before == before && !(std::abs(total - before) <= 0x1p-8 * before))
    __atomic_store_n(b.changed, true, __ATOMIC_RELAXED);
}

template <class T>
NNFAST_INLINE void cross_entropy_backward_row(const CrossEntropyBackward& b, int64_t row) {
  using A = acc_t<T>;
  const T* x = (const T*)b.input + row * b.input_stride;
  T* dx = (T*)b.grad_input + row * b.size;
  const A* weight = (const A*)b.weight;
  const int64_t y = b.target[row];
  const double max = ((const A*)b.max)[row];
  const auto s = scales_of_row<A>(b, row);
  const A scale = A(s.softmax), smooth = A(s.b);
  Sum<A> total;
  const auto exponential = [&](const T* p, auto part)
                               NNFAST_LAMBDA { return exp(load(p, part) - typename decltype(part)::vec(A(max))); };
  const auto grad = [&](auto e, int64_t i, auto part) NNFAST_LAMBDA {
    using V = typename decltype(part)::vec;
    const V v = e * V(scale);
    if (smooth == 0) return v;
    return v - (weight ? load(weight + i, part) * V(smooth) : V(smooth));
  };
  // The class's own gradient is written last, and formed here: in place its logit is overwritten by then.
  const bool ignored = y == b.ignore_index;
  const First<A> one{1};
  const Vec<A> at_y = ignored ? Vec<A>(A(0)) : grad(exponential(x + y, one), y, one) - Vec<A>(A(s.a));
  sweep_lines<A>(dx, b.size, b.stream, [&](int64_t i, auto part, bool past) NNFAST_LAMBDA {
    const auto e = exponential(x + i, part);
    total += keep(e, part);
    store(dx + i, grad(e, i, part), part, past);
  });
  compare_sum<A>(b, row, (double)total.total());
  if (ignored) return;
  if (b.stream) _mm_sfence();
  store(dx + y, at_y, one);
}

// ---- few classes: a lane is a row ----
//
// A row that is shorter than some registers leaves most of their lanes empty, and its sums go across lanes. Here a
// register holds one class of as many rows as it has lanes, and nothing goes across.

constexpr int64_t kFewClasses = 32;
using Rows = std::conditional_t<lanes<f32v> == kLogitRows / 4, Quad<float>, Pair<f32v>>;  // kLogitRows lanes
using AllRows = Full<Rows>;

// Whether the rows, which follow each other, are of this kind.
template <class T, class Call>
NNFAST_INLINE bool few_classes(const Call& f) {
  return sizeof(T) < 8 && f.size <= kFewClasses && f.input_stride == f.size && (f.smoothing == 0 || !f.weight);
}

// Rows or classes side by side, with room for what a register reads or writes too far.
struct FewLogits {
  float x[kFewClasses * kLogitRows + kLanes];
};

// by_class[c][r] = x[r][c]; of the rows that are missing, any finite number.
template <class T>
NNFAST_INLINE void to_classes(const T* x, int64_t rows, int64_t size, FewLogits& by_class) {
  FewLogits wide;
  sweep<float>(rows * size, [&](int64_t i, auto part) NNFAST_LAMBDA { store(wide.x + i, load(x + i, part), part); });
  store(wide.x + rows * size, f32v(0.0f), Full<f32v>{});
  if (rows < kLogitRows) by_class = {};
  transpose<kLogitRows>(wide.x, size, rows, padded(size), by_class.x);
}

// rows[r][c] = by_class[c][r].
NNFAST_INLINE void to_rows(const FewLogits& by_class, int64_t count, int64_t size, FewLogits& rows) {
  FewLogits apart;
  transpose<kFewClasses>(by_class.x, kLogitRows, size, kLogitRows, apart.x);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < size; c += kLanes)
      store(rows.x + r * size + c, load(apart.x + r * kFewClasses + c, Full<f32v>{}), Full<f32v>{});
}

template <class T>
NNFAST_INLINE void cross_entropy_few(const CrossEntropyForward& f, int64_t first, int64_t rows) {
  FewLogits by_class;
  float max[kLogitRows], total[kLogitRows], below[kLogitRows] = {};
  to_classes((const T*)f.input + first * f.size, rows, f.size, by_class);
  Rows m(-INFINITY), s(0.0f);
  for (int64_t c = 0; c < f.size; ++c)
    m = at_least(load(by_class.x + c * kLogitRows, AllRows{}), m);  // passes NaN over
  store(max, m, AllRows{});
  // Where all logits are -inf it is the lowest number that is taken off, so that exp(-inf - ...) is 0.
  const Rows base = at_least(m, Rows(-__FLT_MAX__));
  for (int64_t c = 0; c < f.size; ++c) s = s + exp_of_negative(load(by_class.x + c * kLogitRows, AllRows{}) - base);
  store(total, s, AllRows{});
  if (f.smoothing != 0) {
    Rows sum(0.0f);
    for (int64_t c = 0; c < f.size; ++c) sum = sum + (base - load(by_class.x + c * kLogitRows, AllRows{}));
    store(below, sum, AllRows{});
  }
  for (int64_t row = 0; row < rows; ++row) {
    RowOfLogits r;
    r.max = max[row], r.total = total[row], r.weights = (double)f.size, r.weighted_below = below[row];
    finish_row<float>(f, first + row, r, [&](int64_t y) { return (double)by_class.x[y * kLogitRows + row]; });
  }
}

template <class T>
NNFAST_INLINE void cross_entropy_backward_few(const CrossEntropyBackward& b, int64_t first, int64_t rows) {
  FewLogits by_class, wide;
  float max[kLogitRows] = {}, scale[kLogitRows] = {}, smooth[kLogitRows] = {}, at_y[kLogitRows], total[kLogitRows];
  to_classes((const T*)b.input + first * b.size, rows, b.size, by_class);
  for (int64_t row = 0; row < rows; ++row) {
    const auto s = scales_of_row<float>(b, first + row);
    max[row] = ((const float*)b.max)[first + row];
    scale[row] = (float)s.softmax, smooth[row] = (float)s.b, at_y[row] = (float)s.a;
  }
  const Rows m = load(max, AllRows{}), factor = load(scale, AllRows{}), less = load(smooth, AllRows{});
  Rows sum(0.0f);
  for (int64_t c = 0; c < b.size; ++c) {
    float* const x = by_class.x + c * kLogitRows;
    const Rows e = exp_of_negative(load(x, AllRows{}) - m);
    sum = sum + e;
    store(x, e * factor - less, AllRows{});
  }
  store(total, sum, AllRows{});
  for (int64_t row = 0; row < rows; ++row) compare_sum<float>(b, first + row, total[row]);
  to_rows(by_class, rows, b.size, wide);
  for (int64_t row = 0; row < rows; ++row)
    if (const int64_t y = b.target[first + row]; y != b.ignore_index) wide.x[row * b.size + y] -= at_y[row];
  T* const dx = (T*)b.grad_input + first * b.size;
  sweep<float>(rows * b.size, [&](int64_t i, auto part) NNFAST_LAMBDA { store(dx + i, load(wide.x + i, part), part); });
}

NNFAST_INLINE void cross_entropy_fwd(const CrossEntropyForward& f, int64_t begin, int64_t end) {
  visit(f.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t at_once = std::clamp<int64_t>(kLogitChunk / f.size, 1, kLogitRows);
    const bool few = few_classes<T>(f);
    for (; begin < end; begin += at_once) {
      const int64_t rows = std::min(at_once, end - begin);
      if constexpr (sizeof(T) < 8)
        if (few) {
          cross_entropy_few<T>(f, begin, rows);
          continue;
        }
      cross_entropy_rows<T>(f, begin, rows);
    }
  });
}
NNFAST_INLINE void cross_entropy_bwd(const CrossEntropyBackward& b, int64_t begin, int64_t end) {
  visit(b.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (sizeof(T) < 8)
      if (few_classes<T>(b)) {
        for (; begin < end; begin += kLogitRows)
          cross_entropy_backward_few<T>(b, begin, std::min(kLogitRows, end - begin));
        return;
      }
    for (; begin < end; ++begin) cross_entropy_backward_row<T>(b, begin);
  });
}

}  // namespace nnfast::NNFAST_ISA
