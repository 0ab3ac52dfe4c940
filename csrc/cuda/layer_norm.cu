// LayerNorm on rows, forward and backward. The maths is in math/moments.h.
//
// Forward moves 2 N elements a row (read x, write y), backward 3 N (read grad and x, write dx): a row is read once and
// then held in the registers of its threads. A row too long for that a block walks over
// instead: the later passes find it in shared memory (forward, while it fits) or in L2.
#include "../math/moments.h"
#include "device.cuh"

namespace nnfast::cuda {
namespace {

// How a row is held, by its length: by `Threads` threads side by side, E elements each. The shortest that fits is
// taken; a measurement should settle all of these.
template <int Threads, int E>
struct Held {
  static constexpr int kThreads = Threads, kElements = E, kSize = Threads * E;
  static constexpr int kBlock = Threads < 128 ? 128 : Threads;
  static constexpr int kRows = kBlock / Threads;  // rows a block holds at a time
};
template <class... H>
struct HeldList {};
using HeldForward = HeldList<
    Held<8, 8>, Held<16, 8>, Held<32, 8>, Held<32, 16>, Held<32, 32>, Held<128, 16>, Held<256, 16>, Held<512, 16>,
    Held<512, 32>>;
using HeldBackward = HeldList<
    Held<8, 8>, Held<16, 8>, Held<32, 8>, Held<32, 16>, Held<128, 8>, Held<128, 16>, Held<256, 16>, Held<512, 16>>;
// Blocks of the backward that a multiprocessor has registers for.
template <class H>
constexpr int kResident = (H::kElements == 8 ? 640 : 512) / H::kBlock;
constexpr int kLongBlock = 512;

// body(Held{}) with the first of the list that holds `size` elements, or none().
template <class Body, class None>
auto with_held(int64_t, HeldList<>, Body, None none) {
  return none();
}
template <class First, class... Rest, class Body, class None>
auto with_held(int64_t size, HeldList<First, Rest...>, Body body, None none) {
  return size <= First::kSize ? body(First{}) : with_held(size, HeldList<Rest...>{}, body, none);
}

// ---- forward ----

// Bound by the instructions where a row has a few hundred 16-bit elements, so what is the same for all rows is known
// here: Vectors, and Affine, that there are both a weight and a bias; else it is looked up.
template <class T, class W, class H, bool Vectors, bool Affine>
__global__ void __launch_bounds__(H::kBlock) layer_norm_fwd_kernel(LayerNormForward f, float inverse_size) {
  constexpr int E = H::kElements;
  const int64_t wanted = int64_t(blockIdx.x) * H::kRows + threadIdx.x / H::kThreads;
  // Threads without a row do a warp's common work with the last one, and write nothing.
  const int64_t row = wanted < f.rows ? wanted : f.rows - 1;
  const int n = static_cast<int>(f.size);
  const Columns<T, H::kThreads, E, std::bool_constant<Vectors>> columns{
      static_cast<int>(threadIdx.x % H::kThreads), n, {}};

  float x[E];
  columns.load(static_cast<const T*>(f.input) + row * f.input_stride, x);
  float sum[1] = {};
#pragma unroll
  for (int e = 0; e < E; ++e) sum[0] += x[e];
  sum_over_threads<H::kThreads, 1, 0>(sum);
  const float mean = sum[0] * inverse_size;

  float s[2] = {};  // of x - mean and of its square
  columns.each_inside([&](int e) {
    x[e] -= mean;
    s[0] += x[e];
    s[1] += x[e] * x[e];
  });
  sum_over_threads<H::kThreads, 2, 1>(s);
  const float residual = s[0] * inverse_size;
  const float rstd = reciprocal_std(corrected_variance(s[1] * inverse_size, residual), static_cast<float>(f.eps));
  if (wanted >= f.rows) return;
  if (columns.lane == 0) {
    f.mean[row] = mean + residual;
    f.rstd[row] = rstd;
  }

#pragma unroll
  for (int e = 0; e < E; ++e) x[e] = normalized(x[e], residual, rstd);
  if (Affine || f.weight) {
    float w[E];
    columns.load(static_cast<const W*>(f.weight), w);
#pragma unroll
    for (int e = 0; e < E; ++e) x[e] *= w[e];
  }
  if (Affine || f.bias) {
    float b[E];
    columns.load(static_cast<const W*>(f.bias), b);
#pragma unroll
    for (int e = 0; e < E; ++e) x[e] += b[e];
  }
  columns.store(static_cast<W*>(f.output) + row * f.size, x);
}

// body(i, size) for the part of [0, n) that is this thread's, the same at each call: size is V or 1.
template <int V, class Body>
__device__ void each_column(int64_t n, bool vectors, Body body) {
  if (vectors)
    for (int64_t i = int64_t(threadIdx.x) * V; i < n; i += kLongBlock * V) body(i, std::integral_constant<int, V>{});
  else
    for (int64_t i = threadIdx.x; i < n; i += kLongBlock) body(i, std::integral_constant<int, 1>{});
}

// A block a row. `keep`: the row fits into shared memory, where each thread finds what it has put there itself.
template <class T, class W>
__global__ void __launch_bounds__(kLongBlock) layer_norm_fwd_long_kernel(LayerNormForward f, bool vectors, bool keep) {
  constexpr int V = kVector<T>;
  const int64_t row = blockIdx.x, n = f.size;
  const T* x = static_cast<const T*>(f.input) + row * f.input_stride;
  T* kept = reinterpret_cast<T*>(dynamic_shared());
  float sum[1] = {};
  each_column<V>(n, vectors, [&](int64_t i, auto size) {
    float v[size()];
    load<size()>(x + i, v);
    if (keep) store<size()>(kept + i, v);
#pragma unroll
    for (auto a : v) sum[0] += a;
  });
  sum_over_threads<kLongBlock, 1, 0>(sum);
  const float mean = sum[0] / n;
  if (keep) x = kept;

  float s[2] = {};
  each_column<V>(n, vectors, [&](int64_t i, auto size) {
    float v[size()];
    load<size()>(x + i, v);
#pragma unroll
    for (auto a : v) {
      s[0] += a - mean;
      s[1] += (a - mean) * (a - mean);
    }
  });
  sum_over_threads<kLongBlock, 2, 1>(s);
  const float residual = s[0] / n,
              rstd = reciprocal_std(corrected_variance(s[1] / n, residual), static_cast<float>(f.eps));
  if (threadIdx.x == 0) {
    f.mean[row] = mean + residual;
    f.rstd[row] = rstd;
  }

  each_column<V>(n, vectors, [&](int64_t i, auto size) {
    float v[size()], w[size()];
    load<size()>(x + i, v);
#pragma unroll
    for (auto& a : v) a = normalized(a - mean, residual, rstd);
    if (f.weight) {
      load<size()>(static_cast<const W*>(f.weight) + i, w);
#pragma unroll
      for (int j = 0; j < size(); ++j) v[j] *= w[j];
    }
    if (f.bias) {
      load<size()>(static_cast<const W*>(f.bias) + i, w);
#pragma unroll
      for (int j = 0; j < size(); ++j) v[j] += w[j];
    }
    store<size()>(static_cast<W*>(f.output) + row * n + i, v);
  });
}

// ---- backward ----

// Persistent: a block takes row after row, writes dx, and keeps the sums for dw and db in registers to the end.
template <class T, class W, class H>
__global__ void __launch_bounds__(H::kBlock, kResident<H>)
    layer_norm_bwd_kernel(LayerNormBackward b, float* parts, bool vectors) {
  constexpr int E = H::kElements;
  const int group = threadIdx.x / H::kThreads, n = static_cast<int>(b.size);
  const Columns<T, H::kThreads, E> columns{static_cast<int>(threadIdx.x % H::kThreads), n, vectors};
  const auto* grad_out = static_cast<const W*>(b.grad_out);
  const auto* input = static_cast<const T*>(b.input);
  float w[E];
  if (b.weight) columns.load(static_cast<const W*>(b.weight), w);

  float dw[E] = {}, db[E] = {};
  const int64_t stride = int64_t(gridDim.x) * H::kRows;
  for (int64_t first = int64_t(blockIdx.x) * H::kRows; first < b.rows; first += stride) {
    const int64_t row = first + group;
    // Zeros where this thread has no row: they add nothing to any sum.
    float g[E] = {}, x[E] = {}, mean = 0, rstd = 0, s[2] = {};
    if (row < b.rows) {
      columns.load(grad_out + row * b.grad_out_stride, g);
      columns.load(input + row * b.input_stride, x);
      mean = b.mean[row];
      rstd = b.rstd[row];
    }
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const float xhat = normalized(x[e], mean, rstd), grad_xhat = b.weight ? g[e] * w[e] : g[e];
      dw[e] += g[e] * xhat;
      db[e] += g[e];
      s[0] += grad_xhat;
      s[1] += grad_xhat * xhat;
    }
    if (!b.grad_input) continue;
    // The threads of a block may be one barrier apart, and no more.
    if (H::kThreads > 32) __syncthreads();
    sum_over_threads<H::kThreads, 2, 0>(s);
    if (row >= b.rows) continue;
    const float mean_grad_xhat = s[0] / n, mean_grad_xhat_xhat = s[1] / n;
    float dx[E];
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const float xhat = normalized(x[e], mean, rstd), grad_xhat = b.weight ? g[e] * w[e] : g[e];
      dx[e] = layer_norm_grad_input(grad_xhat, xhat, mean_grad_xhat, mean_grad_xhat_xhat, rstd);
    }
    columns.store(static_cast<T*>(b.grad_input) + row * b.size, dx);
  }

  if (!b.grad_weight && !b.grad_bias) return;
  if constexpr (H::kRows > 1) {
    // The groups of the block add theirs in turn; the last one has all.
    __shared__ float sums[2][E][H::kThreads];
    for (int k = 0; k < H::kRows; ++k) {
      if (group == k)
#pragma unroll
        for (int e = 0; e < E; ++e) {
          if (k) {
            dw[e] += sums[0][e][columns.lane];
            db[e] += sums[1][e][columns.lane];
          }
          sums[0][e][columns.lane] = dw[e];
          sums[1][e][columns.lane] = db[e];
        }
      __syncthreads();
    }
    if (group != H::kRows - 1) return;
  }
  columns.store(parts + int64_t(blockIdx.x) * n, dw);
  columns.store(parts + (int64_t(gridDim.x) + blockIdx.x) * n, db);
}

// dx of a long row: a block a row, which is read twice, the second time from L2.
template <class T, class W>
__global__ void __launch_bounds__(kLongBlock) layer_norm_bwd_long_kernel(LayerNormBackward b, bool vectors) {
  constexpr int V = kVector<T>;
  const int64_t row = blockIdx.x, n = b.size;
  const W* grad_out = static_cast<const W*>(b.grad_out) + row * b.grad_out_stride;
  const T* input = static_cast<const T*>(b.input) + row * b.input_stride;
  const float mean = b.mean[row], rstd = b.rstd[row];
  const auto fetch = [&](int64_t i, auto& grad_xhat, auto& xhat) {
    constexpr int size = sizeof(xhat) / sizeof(float);
    load<size>(grad_out + i, grad_xhat);
    load<size>(input + i, xhat);
#pragma unroll
    for (auto& a : xhat) a = normalized(a, mean, rstd);
    if (b.weight) {
      float w[size];
      load<size>(static_cast<const W*>(b.weight) + i, w);
#pragma unroll
      for (int j = 0; j < size; ++j) grad_xhat[j] *= w[j];
    }
  };
  float s[2] = {};
  each_column<V>(n, vectors, [&](int64_t i, auto size) {
    float grad_xhat[size()], xhat[size()];
    fetch(i, grad_xhat, xhat);
#pragma unroll
    for (int j = 0; j < size(); ++j) {
      s[0] += grad_xhat[j];
      s[1] += grad_xhat[j] * xhat[j];
    }
  });
  sum_over_threads<kLongBlock, 2, 0>(s);
  const float mean_grad_xhat = s[0] / n, mean_grad_xhat_xhat = s[1] / n;
  each_column<V>(n, vectors, [&](int64_t i, auto size) {
    float grad_xhat[size()], xhat[size()];
    fetch(i, grad_xhat, xhat);
#pragma unroll
    for (int j = 0; j < size(); ++j)
      xhat[j] = layer_norm_grad_input(grad_xhat[j], xhat[j], mean_grad_xhat, mean_grad_xhat_xhat, rstd);
    store<size()>(static_cast<T*>(b.grad_input) + row * n + i, xhat);
  });
}

// dw and db of long rows.
template <class T, class W>
__global__ void __launch_bounds__(kTileThreads)
    layer_norm_bwd_affine_kernel(LayerNormBackward b, bool vectors, float* parts) {
  sum_tile<T, 2>(
      b.rows, b.size, vectors, parts, [&](int64_t, int64_t row, int64_t first, const auto& columns, auto& s) {
        float g[kVector<T>], x[kVector<T>];
        columns.load(static_cast<const W*>(b.grad_out) + row * b.grad_out_stride + first, g);
        columns.load(static_cast<const T*>(b.input) + row * b.input_stride + first, x);
        const float mean = b.mean[row], rstd = b.rstd[row];
#pragma unroll
        for (int v = 0; v < kVector<T>; ++v) {
          s[0][v] += g[v] * normalized(x[v], mean, rstd);
          s[1][v] += g[v];
        }
      });
}

// ---- launches ----

// body(T{}, W{}): x and its gradient, and all the rest, which has x's type or is float where x has 16 bits.
template <class Body>
auto visit(DType t, DType w, Body body) {
  return cuda::visit(t, [&](auto e) {
    if constexpr (sizeof(e) == 2)
      if (w == DType::f32) return body(e, float{});
    return body(e, e);
  });
}

int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, name, device);
  return value;
}

template <class T>
bool on_vectors(int64_t size, int64_t stride) {
  return size % kVector<T> == 0 && stride % kVector<T> == 0;
}

}  // namespace

bool kernels_load() {
  cudaFuncAttributes found;
  const bool loads = cudaFuncGetAttributes(&found, sum_parts_kernel<float>) == cudaSuccess;
  if (!loads) cudaGetLastError();  // it is no error of a later call
  return loads;
}

cudaError_t layer_norm(const LayerNormForward& f, cudaStream_t stream) {
  if (!f.rows) return cudaSuccess;
  return visit(f.dtype, f.output_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    const bool vectors = on_vectors<T>(f.size, f.input_stride) && aligned(f.input) && aligned(f.weight) &&
                         aligned(f.bias) && aligned(f.output);
    const auto by_block = [&] {
      // Raised to the most there is, whatever this row needs: two threads with rows of two sizes then ask for the same.
      const size_t bytes = f.size * sizeof(T),
                   most = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) - 1024;
      const bool keep = bytes <= most;
      const auto kernel = layer_norm_fwd_long_kernel<T, W>;
      if (keep)
        if (const auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)) return e;
      return launch(kernel, dim3(f.rows), kLongBlock, keep ? bytes : 0, stream, f, vectors, keep);
    };
    return with_held(
        f.size, HeldForward{},
        [&](auto h) {
          using H = decltype(h);
          const dim3 grid((f.rows + H::kRows - 1) / H::kRows);
          const auto kernel = !vectors             ? layer_norm_fwd_kernel<T, W, H, false, false>
                              : f.weight && f.bias ? layer_norm_fwd_kernel<T, W, H, true, true>
                                                   : layer_norm_fwd_kernel<T, W, H, true, false>;
          return launch(kernel, grid, H::kBlock, 0, stream, f, 1.0f / f.size);
        },
        by_block);
  });
}

int64_t layer_norm_parts(const LayerNormBackward& b) {
  if (!b.rows) return 0;
  const int64_t by_tile = tile_parts(b.rows);
  return with_held(
      b.size, HeldBackward{},
      [&](auto h) -> int64_t {
        using H = decltype(h);
        const int64_t resident = int64_t(attribute(cudaDevAttrMultiProcessorCount)) * kResident<H>;
        return std::min((b.rows + H::kRows - 1) / H::kRows, resident);
      },
      [&] { return by_tile; });
}

cudaError_t layer_norm_backward(const LayerNormBackward& b, float* parts, cudaStream_t stream) {
  const int64_t part_count = layer_norm_parts(b);
  const bool affine = b.grad_weight || b.grad_bias;
  return visit(b.dtype, b.output_dtype, [&](auto t, auto w) -> cudaError_t {
    using T = decltype(t);
    using W = decltype(w);
    const bool vectors = on_vectors<T>(b.size, b.input_stride) && on_vectors<T>(b.size, b.grad_out_stride) &&
                         aligned(b.grad_out) && aligned(b.input) && aligned(b.weight) && aligned(b.grad_input);
    const auto by_block = [&] {
      if (b.grad_input) {
        const auto kernel = layer_norm_bwd_long_kernel<T, W>;
        if (const auto e = launch(kernel, dim3(b.rows), kLongBlock, 0, stream, b, vectors)) return e;
      }
      if (!affine) return cudaSuccess;
      return launch(
          layer_norm_bwd_affine_kernel<T, W>, tile_grid<T>(b.rows, b.size), kTileThreads, 0, stream, b, vectors, parts);
    };
    cudaError_t error = cudaSuccess;
    if (b.rows && b.size) {
      error = with_held(
          b.size, HeldBackward{},
          [&](auto h) {
            using H = decltype(h);
            return launch(layer_norm_bwd_kernel<T, W, H>, dim3(part_count), H::kBlock, 0, stream, b, parts, vectors);
          },
          by_block);
    }
    if (error != cudaSuccess) return error;
    return sum_parts(parts, part_count, b.size, b.output_dtype, b.grad_weight, b.grad_bias, stream);
  });
}

}  // namespace nnfast::cuda
