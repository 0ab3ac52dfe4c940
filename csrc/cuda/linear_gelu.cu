// The elementwise parts of Linear+GELU; a library's GEMM does the rest (or linear_gelu_sm90a.cu all of it). The maths
// is in math/gelu.h.
//
// Forward moves 2 elements for each (read pre, write output), backward 3 (read grad and pre, write grad_pre).
#include "../math/gelu.h"
#include "device.cuh"

namespace nnfast::cuda {
namespace {

constexpr int kThreads = 256;

// body(i, size) for all elements, a vector of V a thread: size is V, or 1 for those after the last whole vector.
template <int V, class Body>
__device__ void each_vector(int64_t count, Body body) {
  const int64_t vectors = count / V, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < vectors) body(i * V, std::integral_constant<int, V>{});
  if (const int64_t rest = vectors * V + i; V > 1 && rest < count) body(rest, std::integral_constant<int, 1>{});
}
inline dim3 vector_grid(int64_t count, int v) {
  const int64_t block = int64_t(kThreads) * v;
  return dim3((count + block - 1) / block);
}

template <class T, bool Tanh, int V>
__global__ void __launch_bounds__(kThreads) gelu_fwd_kernel(int64_t count, const T* input, T* output) {
  each_vector<V>(count, [&](int64_t i, auto size) {
    float x[size()];
    load<size()>(input + i, x);
#pragma unroll
    for (auto& v : x) v = nnfast::gelu<Tanh, float>(v);
    store<size()>(output + i, x);
  });
}

template <class T, bool Tanh, int N>
__device__ void gelu_bwd(const float (&grad)[N], const float (&pre)[N], float (&grad_pre)[N]) {
  // Rounded, as the GEMMs of the backward see it: the bias gradient sums what is stored.
#pragma unroll
  for (int j = 0; j < N; ++j) grad_pre[j] = grad[j] * nnfast::gelu_grad<Tanh, float>(pre[j]);
  round_to<T>(grad_pre);
}

template <class T, bool Tanh, int V>
__global__ void __launch_bounds__(kThreads)
    gelu_bwd_kernel(int64_t count, const T* grad_out, const T* pre, T* grad_pre) {
  each_vector<V>(count, [&](int64_t i, auto size) {
    float g[size()], x[size()];
    load<size()>(grad_out + i, g);
    load<size()>(pre + i, x);
    gelu_bwd<T, Tanh>(g, x, g);
    store<size()>(grad_pre + i, g);
  });
}

template <class T, bool Tanh>
__global__ void __launch_bounds__(kTileThreads) gelu_bwd_bias_kernel(
    int64_t rows, int64_t n, bool vectors, const T* grad_out, const T* pre, T* grad_pre, float* parts) {
  sum_tile<T, 1>(rows, n, vectors, parts, [&](int64_t at, int64_t, int64_t, const auto& columns, auto& s) {
    float g[kVector<T>], x[kVector<T>];
    columns.load(grad_out + at, g);
    columns.load(pre + at, x);
    gelu_bwd<T, Tanh>(g, x, g);
    columns.store(grad_pre + at, g);
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) s[0][v] += g[v];
  });
}

template <class Body>
cudaError_t visit_gelu(DType t, bool tanh, Body body) {
  return visit(t, [&](auto e) { return tanh ? body(e, std::true_type{}) : body(e, std::false_type{}); });
}

}  // namespace

cudaError_t gelu(DType dtype, bool tanh, int64_t count, const void* input, void* output, cudaStream_t stream) {
  if (!count) return cudaSuccess;
  return visit_gelu(dtype, tanh, [&](auto t, auto tanh) {
    using T = decltype(t);
    const bool vectors = aligned(input) && aligned(output);
    return launch(
        vectors ? gelu_fwd_kernel<T, tanh(), kVector<T>> : gelu_fwd_kernel<T, tanh(), 1>,
        vector_grid(count, vectors ? kVector<T> : 1), kThreads, 0, stream, count, static_cast<const T*>(input),
        static_cast<T*>(output));
  });
}

int64_t gelu_parts(const GeluBackward& b) { return b.grad_bias ? tile_parts(b.rows) : 0; }

cudaError_t gelu_backward(const GeluBackward& b, float* parts, cudaStream_t stream) {
  if (!b.size) return cudaSuccess;
  return visit_gelu(b.dtype, b.tanh, [&](auto t, auto tanh) {
    using T = decltype(t);
    const auto *grad_out = static_cast<const T*>(b.grad_out), *pre = static_cast<const T*>(b.pre);
    auto* grad_pre = static_cast<T*>(b.grad_pre);
    bool vectors = aligned(grad_out) && aligned(pre) && aligned(grad_pre);
    if (!b.grad_bias) {
      const int64_t count = b.rows * b.size;
      if (!count) return cudaSuccess;
      return launch(
          vectors ? gelu_bwd_kernel<T, tanh(), kVector<T>> : gelu_bwd_kernel<T, tanh(), 1>,
          vector_grid(count, vectors ? kVector<T> : 1), kThreads, 0, stream, count, grad_out, pre, grad_pre);
    }
    vectors = vectors && b.size % kVector<T> == 0;
    const auto error = launch(
        gelu_bwd_bias_kernel<T, tanh()>, tile_grid<T>(b.rows, b.size), kTileThreads, 0, stream, b.rows, b.size, vectors,
        grad_out, pre, grad_pre, parts);
    if (error != cudaSuccess) return error;
    return sum_parts(parts, gelu_parts(b), b.size, b.dtype, b.grad_bias, nullptr, stream);
  });
}

}  // namespace nnfast::cuda
