// What the kernels of optimizers share: one step for any number of tensors in one launch, which stand in a table on the
// device; a block updates a chunk of one of them, whatever its size and dtypes. An optimizer adds its formula.
#pragma once

#include "device.cuh"

namespace nnfast::cuda {

constexpr int kStepThreads = 256;

// Elements of a type known here, or only by the table.
template <class T>
struct Known {
  static constexpr int V = kVector<T>;
  T* p;
  __device__ explicit Known(void* p, DType = {}) : p(static_cast<T*>(p)) {}
  template <int N>
  __device__ void load(int64_t i, float (&x)[N]) const {
    cuda::load<N>(p + i, x);
  }
  template <int N>
  __device__ void store(int64_t i, const float (&x)[N]) const {
    cuda::store<N>(p + i, x);
  }
};
struct Any {
  static constexpr int V = 4;  // 16 bytes of the widest
  void* p;
  DType dtype;
  __device__ explicit Any(void* p, DType dtype) : p(p), dtype(dtype) {}
  template <class Body>
  __device__ void visit(Body body) const {
    if (dtype == DType::f32)
      body(Known<float>(p));
    else if (dtype == DType::bf16)
      body(Known<bf16>(p));
    else
      body(Known<f16>(p));
  }
  template <int N>
  __device__ void load(int64_t i, float (&x)[N]) const {
    visit([&](auto known) { known.load(i, x); });
  }
  template <int N>
  __device__ void store(int64_t i, const float (&x)[N]) const {
    visit([&](auto known) { known.store(i, x); });
  }
};

// body(i, size) for the part of elements [begin, end) that is this thread's: size is V where all lies on 16 bytes,
// or 1.
template <int V, class Body>
__device__ void each_of_chunk(bool aligned, int64_t begin, int64_t end, Body body) {
  int64_t i = begin + threadIdx.x;
  if (aligned) {
    const int64_t whole = begin + (end - begin) / V * V;
    for (int64_t k = begin + threadIdx.x * V; k < whole; k += kStepThreads * V)
      body(k, std::integral_constant<int, V>{});
    i = whole + threadIdx.x;
  }
  for (; i < end; i += kStepThreads) body(i, std::integral_constant<int, 1>{});
}

// The part of a tensor that is this block's.
struct Chunk {
  int64_t begin, end;
  __device__ Chunk(const StepTensor& t, const StepChunk& c)
      : begin(c.index * kStepChunk), end(t.size < begin + kStepChunk ? t.size : begin + kStepChunk) {}
};

// Formula: what a step is made of.
//   Numbers: what the launch is told (kernels.h); Scalars<A>: what an element needs; kState: tensors of state.
//   at(numbers, lr, count): the scalars, in double.
//   moments(p, g, s, kept, scalars): one element's state, where bit k of `kept` says whether there is state s[k].
//   param(p, g, s, kept, scalars): the parameter, from what moments() left. State from kLate on is known to param()
//   alone: it is read when the rest is stored, for registers have no room for all of it.
template <class Formula, class E>
__device__ void update(
    const StepTensor& t, const typename Formula::template Scalars<float>& scalars,
    const Step<typename Formula::Numbers>& a, const Chunk& chunk) {
  constexpr int K = Formula::kState;
  const E param(t.param, t.param_dtype), grad(t.grad, t.grad_dtype);
  void* state[K];
  unsigned kept = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) kept |= unsigned((state[k] = t.state[k]) != nullptr) << k;
  const DType state_dtype = t.state_dtype;
  each_of_chunk<E::V>(t.aligned, chunk.begin, chunk.end, [&](int64_t i, auto size) {
    constexpr int N = size();
    float p[N], g[N], s[K][N];
    param.load(i, p);
    grad.load(i, g);
    const auto each_state = [&](int first, int last, auto body) {
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (first <= k && k < last && (kept >> k & 1)) body(E(state[k], state_dtype), s[k]);
    };
    const auto each_element = [&](auto body) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        float of_one[K];
#pragma unroll
        for (int k = 0; k < K; ++k) of_one[k] = s[k][j];
        body(p[j], g[j], of_one);
#pragma unroll
        for (int k = 0; k < K; ++k) s[k][j] = of_one[k];
      }
    };
    const auto load = [&](const E& e, float (&x)[N]) { e.load(i, x); };
    const auto store = [&](const E& e, const float (&x)[N]) { e.store(i, x); };
    each_state(0, Formula::kLate, load);
    if (a.grad_scale) {
      const float scale = *a.grad_scale;
#pragma unroll
      for (auto& x : g) x = x / scale;
      grad.store(i, g);
    }
    if (a.clip_coef) {
      const float coef = *a.clip_coef;
#pragma unroll
      for (auto& x : g) x = x * coef;
    }
    each_element([&](float p, float& g, float (&s)[K]) {
      if (a.maximize) g = -g;
      Formula::moments(p, g, s, kept, scalars);
    });
    each_state(0, Formula::kLate, store);
    each_state(Formula::kLate, K, load);
    each_element([&](float& p, float g, float (&s)[K]) { Formula::param(p, g, s, kept, scalars); });
    each_state(Formula::kLate, K, store);
    param.store(i, p);
  });
}

// The scalars of a tensor, for one thread of each of its blocks. A count on the device is read by all of them, and
// advanced by the last one to have read it.
template <class Formula>
__device__ auto scalars(const Step<typename Formula::Numbers>& a, StepTensor& t) {
  if (!t.step && !a.device_lr && t.step_offset == 0) return a.numbers.known;
  double count = a.step + t.step_offset;
  if (t.step) {
    const float next = *reinterpret_cast<volatile float*>(t.step) + 1;
    count = next;
    __threadfence();  // the count is read before this block says so
    if (atomicInc(&t.done, t.chunks - 1) == t.chunks - 1) {
      __threadfence();  // and advances after the last one has said so
      *t.step = next;
    }
  }
  double lr = a.lr;
  if (a.device_lr)
    lr = a.device_lr_is_double ? *static_cast<const double*>(a.device_lr) : *static_cast<const float*>(a.device_lr);
  return Formula::at(a.numbers, lr, count);
}

template <class Formula>
__device__ void step(const Step<typename Formula::Numbers>& a) {
  if (a.found_inf && *a.found_inf != 0) return;
  const StepChunk which = a.table.chunks[blockIdx.x];
  StepTensor& t = a.table.tensors[which.tensor];
  using Scalars = typename Formula::template Scalars<float>;
  __shared__ Scalars of_all;
  if (threadIdx.x == 0) of_all = Scalars(scalars<Formula>(a, t));
  __syncthreads();
  const Chunk chunk(t, which);
  const DType dtype = t.param_dtype;
  if (dtype != t.grad_dtype || dtype != t.state_dtype)
    update<Formula, Any>(t, of_all, a, chunk);
  else if (dtype == DType::f32)
    update<Formula, Known<float>>(t, of_all, a, chunk);
  else if (dtype == DType::bf16)
    update<Formula, Known<bf16>>(t, of_all, a, chunk);
  else
    update<Formula, Known<f16>>(t, of_all, a, chunk);
}

}  // namespace nnfast::cuda
