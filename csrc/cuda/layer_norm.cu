// LayerNorm on rows, forward and backward. The maths is in math/moments.h.
//
// Forward moves 2 N elements a row (read x, write y), backward 3 N (read grad and x, write dx): a row is read once and
// then held in the registers of its threads, in the backward by a cluster of blocks where one has too few. Over a row
// too long for that a block walks instead: the later passes find it in shared memory (forward, while it fits) or in L2;
// backward moves 5 N then, for dw and db read grad and x again.
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
    Held<4, 16>, Held<8, 16>, Held<16, 16>, Held<16, 32>, Held<32, 32>, Held<128, 16>, Held<256, 16>, Held<512, 16>>;
using HeldBackward = HeldList<
    Held<8, 8>, Held<16, 8>, Held<32, 8>, Held<32, 16>, Held<128, 8>, Held<128, 16>, Held<256, 16>, Held<512, 16>>;
// Where it cannot be by vectors: the longest would spill on a Blackwell, and goes to a cluster.
using HeldBackwardByElements =
    HeldList<Held<8, 8>, Held<16, 8>, Held<32, 8>, Held<32, 16>, Held<128, 8>, Held<128, 16>, Held<256, 16>>;
// By each block of a cluster, which share a row's columns.
using HeldByCluster = Held<512, 16>;
// Threads of the backward that a multiprocessor shall have registers for: what the compiler is held to. Blackwell takes
// more of them for the same code. The launch asks how many blocks that are.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kShortRows = 768;
#else
constexpr int kShortRows = 896;
#endif
template <class H>
constexpr int kResident = (H::kElements == 8 ? kShortRows : 512) / H::kBlock;
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

// Bound by the instructions where a row has a few hundred 16-bit elements, so what is the same for all rows is known at
// compile time: Vectors, and Affine, that there are both a weight and a bias; without Affine each is looked up.
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
  for (int e = 0; e < E; ++e) sum[0] += x[e] * inverse_size;  // the sum of x alone may overflow
  sum_over_threads<H::kThreads>(sum);
  const float mean = sum[0];

  float s[2] = {};  // of x - mean and of its square
  columns.each_inside([&](int e) {
    x[e] -= mean;
    s[0] += x[e];
    s[1] += x[e] * x[e];
  });
  sum_over_threads<H::kThreads>(s);
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

// A block a row. `keep`: the row fits into shared memory, where each thread finds what it has put there itself. Up to
// 16384 elements a multiprocessor then has registers for three or four blocks; with the row in registers, for one.
template <class T, class W>
__global__ void __launch_bounds__(kLongBlock)
    layer_norm_fwd_long_kernel(LayerNormForward f, float inverse_size, bool vectors, bool keep) {
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
    for (auto a : v) sum[0] += a * inverse_size;
  });
  sum_over_threads<kLongBlock>(sum);
  const float mean = sum[0];
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
  sum_over_threads<kLongBlock>(s);
  const float residual = s[0] * inverse_size;
  const float rstd = reciprocal_std(corrected_variance(s[1] * inverse_size, residual), static_cast<float>(f.eps));
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

// Persistent: a block, or a cluster, takes row after row, writes dx, and keeps the sums for dw and db in registers to
// the end. By vectors the next row is on its way into shared memory meanwhile.
template <class T, class W, class H, bool Vectors, bool Cluster>
__global__ void __launch_bounds__(H::kBlock, kResident<H>) layer_norm_bwd_kernel(LayerNormBackward b, float* parts) {
  // A team is a block, of which each group of threads holds one of kRows rows, or a cluster, which holds one row.
  int team = blockIdx.x, teams = gridDim.x, n = static_cast<int>(b.size), start = 0;
#if NNFAST_HOPPER
  const auto cluster = cooperative_groups::this_cluster();
  if constexpr (Cluster) {
    const int blocks = cluster.num_blocks(), rank = cluster.block_rank();
    team /= blocks;
    teams /= blocks;
    const int share = ((n + blocks - 1) / blocks + kVector<T> - 1) / kVector<T> * kVector<T>;
    start = std::min(rank * share, n);
    n = std::min(share, n - start);
    cluster.sync();  // all of them run, so that each can be written to
  }
#else
  if (Cluster) return;  // the launch asks compiled_for_hopper()
#endif
  constexpr int E = H::kElements;
  using G = W;  // the gradient's
  const int group = threadIdx.x / H::kThreads;
  const Columns<T, H::kThreads, E, std::bool_constant<Vectors>> columns{
      static_cast<int>(threadIdx.x % H::kThreads), n, {}};
  const G* grad_out = static_cast<const G*>(b.grad_out) + start;
  const T* input = static_cast<const T*>(b.input) + start;
  float w[E];
#pragma unroll
  for (auto& v : w) v = 1;
  if (b.weight) columns.load(static_cast<const W*>(b.weight) + start, w);

  char *grad_slots = dynamic_shared(), *input_slots = grad_slots + H::kBlock * E * sizeof(G);
  float next_mean = 0, next_rstd = 0;
  const auto fetch = [&](int64_t row) {
    if (row < b.rows) {
      if (Vectors) {
        columns.fetch(grad_out + row * b.grad_out_stride, grad_slots);
        columns.fetch(input + row * b.input_stride, input_slots);
      }
      next_mean = b.mean[row];
      next_rstd = b.rstd[row];
    }
    if (Vectors) __pipeline_commit();
  };

  const float inverse_size = 1.0f / static_cast<int>(b.size);
  float dw[E] = {}, db[E] = {};
  const int64_t stride = int64_t(teams) * H::kRows;
  int slot = 0;
  fetch(int64_t(team) * H::kRows + group);
  for (int64_t first = int64_t(team) * H::kRows; first < b.rows; first += stride, slot ^= 1) {
    const int64_t row = first + group;
    // Zeros where this thread has no row: they add nothing to any sum.
    float g[E] = {}, x[E] = {}, mean = 0, rstd = 0, s[2] = {};
    if (Vectors) __pipeline_wait_prior(0);
    if (row < b.rows) {
      if constexpr (Vectors) {
        columns.template take<G>(grad_slots, g);
        columns.template take<T>(input_slots, x);
      } else {
        columns.load(grad_out + row * b.grad_out_stride, g);
        columns.load(input + row * b.input_stride, x);
      }
      mean = next_mean;
      rstd = next_rstd;
    }
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const float xhat = normalized(x[e], mean, rstd), grad_xhat = g[e] * w[e];
      dw[e] += g[e] * xhat;
      db[e] += g[e];
      s[0] += grad_xhat;
      s[1] += grad_xhat * xhat;
    }
    fetch(row + stride);  // what lay in the slots is in registers
    if (!b.grad_input) continue;
#if NNFAST_HOPPER
    if constexpr (Cluster)
      sum_over_cluster<H::kThreads>(cluster, s, slot);
    else
#endif
      sum_over_threads<H::kThreads>(s, slot);
    if (row >= b.rows) continue;
    const float mean_grad_xhat = s[0] * inverse_size, mean_grad_xhat_xhat = s[1] * inverse_size;
    float dx[E];
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const float xhat = normalized(x[e], mean, rstd), grad_xhat = g[e] * w[e];
      dx[e] = layer_norm_grad_input(grad_xhat, xhat, mean_grad_xhat, mean_grad_xhat_xhat, rstd);
    }
    columns.store(static_cast<T*>(b.grad_input) + row * b.size + start, dx);
  }

  let_the_next_kernel_start();
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
  columns.store(parts + team * b.size + start, dw);
  columns.store(parts + (teams + team) * b.size + start, db);
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
  sum_over_threads<kLongBlock>(s);
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

template <class T>
bool on_vectors(int64_t size, int64_t stride) {
  return size % kVector<T> == 0 && stride % kVector<T> == 0;
}

template <class T>
bool on_vectors(const LayerNormBackward& b) {
  return on_vectors<T>(b.size, b.input_stride) && on_vectors<T>(b.size, b.grad_out_stride) && aligned(b.grad_out) &&
         aligned(b.input) && aligned(b.weight) && aligned(b.grad_input);
}

// More than 48 KB a block, of which the kernel itself declares less than 16, must be asked for before the first launch.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, size_t bytes) {
  if (bytes <= 32 << 10) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// How a backward is launched. kernel: null where no block and no cluster holds a row.
struct Plan {
  void (*kernel)(LayerNormBackward, float*) = nullptr;
  int block = 0, cluster = 1;
  size_t shared = 0;
  int64_t parts = 0;
};

// Blocks that the current device runs at a time.
template <class Kernel>
int resident_blocks(Kernel kernel, int block, size_t shared) {
  int count = 0;
  if (allow_shared(kernel, shared) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, block, shared) != cudaSuccess)
    cudaGetLastError();  // the launch will say so
  return std::max(count, 1) * attribute(cudaDevAttrMultiProcessorCount);
}

// Clusters of so many blocks that the current device runs at a time; 0 where it cannot.
template <class T, class W, class H, bool Vectors>
int resident_clusters(int blocks, size_t shared) {
  static std::array<OfDevice, kMostBlocks + 1> known;
  const auto kernel = layer_norm_bwd_kernel<T, W, H, Vectors, true>;
  return known[blocks]([&] {
    if (!compiled_for_hopper(kernel)) return 0;
    const LaunchConfig config({dim3(blocks), H::kBlock, shared, nullptr, blocks});
    int count = 0;
    const bool runs = allow_shared(kernel, shared) == cudaSuccess &&
                      cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess;
    if (!runs) cudaGetLastError();  // it is no error of a later call
    return runs ? count : 0;
  });
}

template <class T, class W, bool Vectors>
Plan plan(const LayerNormBackward& b) {
  // The next rows of a block on their way, of grad_out and of x.
  const auto shared = [](auto h) {
    return Vectors ? decltype(h)::kSize * decltype(h)::kRows * (sizeof(W) + sizeof(T)) : 0;
  };
  return with_held(
      b.size, std::conditional_t<Vectors, HeldBackward, HeldBackwardByElements>{},
      [&](auto h) -> Plan {
        using H = decltype(h);
        const auto kernel = layer_norm_bwd_kernel<T, W, H, Vectors, false>;
        static OfDevice known;
        const int64_t resident = known([&] { return resident_blocks(kernel, H::kBlock, shared(h)); });
        return {kernel, H::kBlock, 1, shared(h), std::min((b.rows + H::kRows - 1) / H::kRows, resident)};
      },
      [&]() -> Plan {
        using H = HeldByCluster;
        int blocks = 2;
        while (int64_t(blocks) * H::kSize < b.size) blocks *= 2;
        if (blocks <= kMostBlocks)
          if (const int64_t resident = resident_clusters<T, W, H, Vectors>(blocks, shared(H{})))
            return {
                layer_norm_bwd_kernel<T, W, H, Vectors, true>, H::kBlock, blocks, shared(H{}),
                std::min(b.rows, resident)};
        return {nullptr, 0, 1, 0, tile_parts(b.rows)};
      });
}

Plan plan(const LayerNormBackward& b) {
  return visit(b.dtype, b.output_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    return on_vectors<T>(b) ? plan<T, W, true>(b) : plan<T, W, false>(b);
  });
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
    const float inverse_size = 1.0f / f.size;
    const auto by_block = [&] {
      // Raised to the most there is, whatever this row needs: two threads with rows of two sizes then ask for the same.
      const size_t bytes = f.size * sizeof(T),
                   most = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) - 1024;
      const bool keep = bytes <= most;
      const auto kernel = layer_norm_fwd_long_kernel<T, W>;
      if (keep)
        if (const auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)) return e;
      return launch(kernel, dim3(f.rows), kLongBlock, keep ? bytes : 0, stream, f, inverse_size, vectors, keep);
    };
    return with_held(
        f.size, HeldForward{},
        [&](auto h) {
          using H = decltype(h);
          const dim3 grid((f.rows + H::kRows - 1) / H::kRows);
          const auto kernel = !vectors             ? layer_norm_fwd_kernel<T, W, H, false, false>
                              : f.weight && f.bias ? layer_norm_fwd_kernel<T, W, H, true, true>
                                                   : layer_norm_fwd_kernel<T, W, H, true, false>;
          return launch(kernel, grid, H::kBlock, 0, stream, f, inverse_size);
        },
        by_block);
  });
}

int64_t layer_norm_parts(const LayerNormBackward& b) { return b.rows ? plan(b).parts : 0; }

cudaError_t layer_norm_backward(const LayerNormBackward& b, float* parts, cudaStream_t stream) {
  const Plan p = b.rows && b.size ? plan(b) : Plan{};
  const auto launch_long = [&] {
    return visit(b.dtype, b.output_dtype, [&](auto t, auto w) {
      using T = decltype(t);
      using W = decltype(w);
      const bool vectors = on_vectors<T>(b);
      if (b.grad_input) {
        const auto kernel = layer_norm_bwd_long_kernel<T, W>;
        if (const auto e = launch(kernel, dim3(b.rows), kLongBlock, 0, stream, b, vectors)) return e;
      }
      if (!b.grad_weight && !b.grad_bias) return cudaSuccess;
      const dim3 grid(tile_grid<T>(b.rows, b.size).x, p.parts);
      return launch(layer_norm_bwd_affine_kernel<T, W>, grid, kTileThreads, 0, stream, b, vectors, parts);
    });
  };
  if (p.kernel) {
    const Launch how{dim3(p.parts * p.cluster), p.block, p.shared, stream, p.cluster};
    const auto error = launch(p.kernel, how, b, parts);
    if (error != cudaSuccess && p.cluster == 1) return error;
    if (error != cudaSuccess) {
      cudaGetLastError();  // a device that counts its clusters and takes none
      if (const auto e = launch_long()) return e;
    }
  } else if (b.rows && b.size) {
    if (const auto e = launch_long()) return e;
  }
  return sum_parts(parts, p.parts, b.size, b.output_dtype, b.grad_weight, b.grad_bias, stream);
}

}  // namespace nnfast::cuda
