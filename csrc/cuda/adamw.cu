// One AdamW step for any number of tensors in one launch. The maths is in math/adamw.h.
//
// Bound by memory: read p, g, m, v and write p, m, v, which is 28 bytes an element in float. What a block updates
// stands in a table on the device: a chunk of a tensor, whatever its size and dtypes.
#include "device.cuh"

namespace nnfast::cuda {
namespace {

constexpr int kThreads = 256,
              kResident = 3;  // blocks a multiprocessor holds at the least; a measurement should settle it

// Elements of a type known here, or only by the table.
template <class T>
struct Known {
  T* p;
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
  void* p;
  DType dtype;
  template <class Body>
  __device__ void visit(Body body) const {
    if (dtype == DType::f32)
      body(Known<float>{static_cast<float*>(p)});
    else if (dtype == DType::bf16)
      body(Known<bf16>{static_cast<bf16*>(p)});
    else
      body(Known<f16>{static_cast<f16*>(p)});
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

// Elements [begin, end) of a tensor, V of them at a time: 16 bytes of each of its arrays, or of the widest.
template <int V, class P, class G, class M>
__device__ void update(
    const AdamWTensor& t, P param, G grad, M exp_avg, M exp_avg_sq, M max_exp_avg_sq, const AdamWStep<float>& step,
    bool maximize, const float* grad_scale, const float* clip_coef, int64_t begin, int64_t end) {
  const bool amsgrad = t.max_exp_avg_sq;
  const auto at = [&](int64_t i, auto size) {
    constexpr int N = size();
    float p[N], g[N], m[N], v[N];
    param.load(i, p);
    grad.load(i, g);
    exp_avg.load(i, m);
    exp_avg_sq.load(i, v);
    if (grad_scale) {
      const float scale = *grad_scale;
#pragma unroll
      for (auto& a : g) a = a / scale;
      grad.store(i, g);
    }
    if (clip_coef) {
      const float coef = *clip_coef;
#pragma unroll
      for (auto& a : g) a = a * coef;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) adamw_moments(maximize ? -g[j] : g[j], m[j], v[j], step);
    exp_avg.store(i, m);
    exp_avg_sq.store(i, v);
    if (amsgrad) {
      float top[N];
      max_exp_avg_sq.load(i, top);
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = top[j] = v[j] > top[j] || v[j] != v[j] ? v[j] : top[j];  // a NaN stays
      max_exp_avg_sq.store(i, top);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) p[j] = adamw_param(p[j], m[j], v[j], step);
    param.store(i, p);
  };
  int64_t i = begin + threadIdx.x;
  if (t.aligned) {
    const int64_t whole = begin + (end - begin) / V * V;
    for (int64_t k = begin + threadIdx.x * V; k < whole; k += kThreads * V) at(k, std::integral_constant<int, V>{});
    i = whole + threadIdx.x;
  }
  for (; i < end; i += kThreads) at(i, std::integral_constant<int, 1>{});
}

template <class T, int V>
__device__ void update(const AdamWTensor& t, const AdamWStep<float>& step, const AdamW& a, int64_t begin, int64_t end) {
  const auto known = [](void* p) { return Known<T>{static_cast<T*>(p)}; };
  update<V>(
      t, known(t.param), known(t.grad), known(t.exp_avg), known(t.exp_avg_sq), known(t.max_exp_avg_sq), step,
      a.maximize, a.grad_scale, a.clip_coef, begin, end);
}

// The scalars of a tensor, for one thread of each of its blocks. A count on the device is read by all of them and then
// advanced by the last one that has.
__device__ AdamWStep<double> scalars(const AdamW& a, AdamWTensor& t) {
  if (!t.step && !a.device_lr && t.step_offset == 0) return a.scalars;
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
  return AdamWStep<double>(lr, a.beta1, a.beta2, a.eps, a.weight_decay, count);
}

__global__ void __launch_bounds__(kThreads, kResident) adamw_kernel(const __grid_constant__ AdamW a) {
  if (a.found_inf && *a.found_inf != 0) return;
  const AdamWChunk chunk = a.chunks[blockIdx.x];
  AdamWTensor& t = a.tensors[chunk.tensor];
  __shared__ AdamWStep<float> step;
  if (threadIdx.x == 0) step = AdamWStep<float>(scalars(a, t));
  __syncthreads();
  const int64_t begin = chunk.index * kAdamWChunk, end = t.size < begin + kAdamWChunk ? t.size : begin + kAdamWChunk;
  const DType dtype = t.param_dtype;
  if (dtype != t.grad_dtype || dtype != t.moments_dtype)
    update<4>(
        t, Any{t.param, dtype}, Any{t.grad, t.grad_dtype}, Any{t.exp_avg, t.moments_dtype},
        Any{t.exp_avg_sq, t.moments_dtype}, Any{t.max_exp_avg_sq, t.moments_dtype}, step, a.maximize, a.grad_scale,
        a.clip_coef, begin, end);
  else if (dtype == DType::f32)
    update<float, 4>(t, step, a, begin, end);
  else if (dtype == DType::bf16)
    update<bf16, 8>(t, step, a, begin, end);
  else
    update<f16, 8>(t, step, a, begin, end);
}

}  // namespace

cudaError_t adamw(const AdamW& a, cudaStream_t stream) {
  return launch(adamw_kernel, dim3(a.chunk_count), kThreads, 0, stream, a);
}

}  // namespace nnfast::cuda
