// What the kernels share: 16-byte accesses, a row over the registers of several threads, sums over rows.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

// Thread block clusters, and launches that overlap: in code that was compiled for a GPU that has them.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define NNFAST_HOPPER 1
#else
#define NNFAST_HOPPER 0
#endif

namespace nnfast::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements of a 16-byte access

// From a run-time dtype to a type: body(T{}).
template <class Body>
auto visit(DType t, Body body) {
  switch (t) {
    case DType::bf16: return body(bf16{});
    case DType::f16: return body(f16{});
    default: return body(float{});
  }
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// How a kernel is launched. Blocks of a cluster: they run at the same time and see each other's shared memory.
// Overlaps: it may start before the kernel before it has ended, and waits for that one by after_the_kernel_before().
struct Launch {
  dim3 grid;
  int block;
  size_t shared;
  cudaStream_t stream;
  int cluster = 1;
  bool overlaps = false;
};
class LaunchConfig {
 public:
  explicit LaunchConfig(const Launch& how) {
    config_.gridDim = how.grid;
    config_.blockDim = dim3(how.block);
    config_.dynamicSmemBytes = how.shared;
    config_.stream = how.stream;
    config_.attrs = attributes_;
    if (how.cluster > 1) {
      auto& a = attributes_[config_.numAttrs++];
      a.id = cudaLaunchAttributeClusterDimension;
      a.val.clusterDim = {static_cast<unsigned>(how.cluster), 1, 1};
    }
    if (how.overlaps) {
      auto& a = attributes_[config_.numAttrs++];
      a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      a.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
  const cudaLaunchConfig_t* operator&() const { return &config_; }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attributes_[2]{};
};
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), const Launch& how, const Args&... args) {
  const LaunchConfig config(how);
  return cudaLaunchKernelEx(&config, kernel, args...);
}
template <class... Params, class... Args>
cudaError_t launch(
    void (*kernel)(Params...), dim3 grid, int block, size_t shared, cudaStream_t stream, const Args&... args) {
  return launch(kernel, Launch{grid, block, shared, stream}, args...);
}

// A number of each device, asked once. Two threads may ask at once, and find the same.
class OfDevice {
 public:
  template <class Ask>
  int operator()(Ask ask) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= static_cast<int>(known_.size())) return ask();
    auto& known = known_[device];
    if (!known) known = ask() + 1;
    return known - 1;
  }

 private:
  std::array<std::atomic<int>, 64> known_{};
};

inline int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, name, device);
  return value;
}

// Whether what the current device runs of a kernel was compiled with NNFAST_HOPPER: a Hopper GPU may run the PTX of an
// older one. All kernels are compiled for the same.
template <class... Params>
bool compiled_for_hopper(void (*kernel)(Params...)) {
  static OfDevice known;
  return known([&] {
    cudaFuncAttributes found{};
    const bool there = cudaFuncGetAttributes(&found, kernel) == cudaSuccess;
    if (!there) cudaGetLastError();  // it is no error of a later call
    return there && found.ptxVersion >= 90 ? 1 : 0;
  });
}

// In a kernel that overlaps with the one before it: here that one has ended, and what it wrote is seen.
__device__ inline void after_the_kernel_before() {
#if NNFAST_HOPPER
  cudaGridDependencySynchronize();
#endif
}
// In the one before, by every block: the next may start as soon as there is room for it.
__device__ inline void let_the_next_kernel_start() {
#if NNFAST_HOPPER
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// The shared memory of a block beyond what its kernel declares: as much as the launch says.
__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(16) char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

// V elements as they lie in memory, read and written in pieces of 16 bytes at the most.
template <class T, int V>
struct Raw {
  static constexpr int kPiece = V * sizeof(T) < 16 ? V : kVector<T>;
  struct alignas(kPiece * sizeof(T)) Piece {
    T v[kPiece];
  };
  Piece piece[V / kPiece];

  __device__ void load(const T* p) {
#pragma unroll
    for (int k = 0; k < V / kPiece; ++k) piece[k] = reinterpret_cast<const Piece*>(p)[k];
  }
  __device__ void store(T* p) const {
#pragma unroll
    for (int k = 0; k < V / kPiece; ++k) reinterpret_cast<Piece*>(p)[k] = piece[k];
  }
  __device__ T& operator[](int i) { return piece[i / kPiece].v[i % kPiece]; }
};

// x[i] = A(v[i]). A float is a bfloat16 with 16 zero bits behind it, so two that lie in one register take an
// instruction each; the compiler takes two.
template <int N, class T, class A>
__device__ void convert(const T (&v)[N], A (&x)[N]) {
  if constexpr (std::is_same_v<T, bf16> && std::is_same_v<A, float> && N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      uint32_t pair;
      std::memcpy(&pair, &v[i], 4);
      const uint32_t low = pair << 16, high = pair & 0xffff0000u;
      std::memcpy(&x[i], &low, 4);
      std::memcpy(&x[i + 1], &high, 4);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = A(v[i]);
  }
}

// x as it is once it is stored in T. Two numbers are packed by one instruction, one alone by a slow one.
template <class T, int N>
__device__ void round_to(float (&x)[N]) {
  T v[N];
  if constexpr (std::is_same_v<T, bf16> && N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[i], x[i + 1]);
      v[i] = pair.x;
      v[i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = T(x[i]);
  }
  convert(v, x);
}

template <int V, class T, class A>
__device__ void load(const T* p, A (&x)[V]) {
  Raw<T, V> raw;
  raw.load(p);
#pragma unroll
  for (int k = 0; k < V / raw.kPiece; ++k) {
    A piece[raw.kPiece];
    convert(raw.piece[k].v, piece);
#pragma unroll
    for (int j = 0; j < raw.kPiece; ++j) x[k * raw.kPiece + j] = piece[j];
  }
}
template <int V, class T, class A>
__device__ void store(T* p, const A (&x)[V]) {
  Raw<T, V> raw;
#pragma unroll
  for (int i = 0; i < V; ++i) raw[i] = T(x[i]);
  raw.store(p);
}

// The same, to global memory alone, and as whole 16 bytes: left to itself the compiler stores some of them in quarters.
template <int V, class T, class A>
__device__ void store_global(T* p, const A (&x)[V]) {
  if constexpr (V * sizeof(T) == 16) {
    Raw<T, V> raw;
#pragma unroll
    for (int i = 0; i < V; ++i) raw[i] = T(x[i]);
    uint4 whole;
    std::memcpy(&whole, &raw, 16);
    __stwb(reinterpret_cast<uint4*>(p), whole);
  } else if constexpr (V * sizeof(T) > 16) {
#pragma unroll
    for (int k = 0; k < V; k += kVector<T>) {
      A piece[kVector<T>];
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) piece[j] = x[k + j];
      store_global<kVector<T>>(p + k, piece);
    }
  } else {
    store<V>(p, x);
  }
}

// Which columns of a row of n <= Threads * E one thread of Threads holds. By 16-byte vectors where every row starts on
// 16 bytes and ends with a vector; otherwise one by one, side by side with its neighbours, so that a warp's
// accesses still are one run of memory. What lies past the end reads as 0 and is not written. Vectors: bool, or
// std::bool_constant where a kernel is compiled for the one or the other.
template <class T, int Threads, int E, class Vectors = bool>
struct Columns {
  static constexpr int V = kVector<T> < E ? kVector<T> : E;
  int lane, n;
  Vectors vectors;

  __device__ int column(int e) const { return vectors ? (e / V * Threads + lane) * V + e % V : e * Threads + lane; }
  __device__ bool inside(int e) const { return column(e) < n; }

  // body(e) for each element that is this thread's and lies inside. By vectors that is asked once a vector.
  template <class Body>
  __device__ void each_inside(Body body) const {
#pragma unroll
    for (int k = 0; k < E / V; ++k) {
      if (vectors && !inside(k * V)) continue;
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (vectors || inside(k * V + j)) body(k * V + j);
    }
  }

  template <class U, class Out>
  __device__ void load(const U* row, Out (&x)[E]) const {
    if (vectors) {
#pragma unroll
      for (int k = 0; k < E / V; ++k) {
        Out piece[V] = {};
        if (inside(k * V)) cuda::load<V>(row + column(k * V), piece);
#pragma unroll
        for (int j = 0; j < V; ++j) x[k * V + j] = piece[j];
      }
    } else {
#pragma unroll
      for (int e = 0; e < E; ++e) x[e] = inside(e) ? Out(row[column(e)]) : Out(0);
    }
  }
  // The same in two steps, by vectors: fetch() starts a copy into `slots`, room for E elements of each thread of the
  // block, and take() reads from there after __pipeline_wait_prior. A thread takes what it has fetched itself, so that
  // no barrier is needed.
  template <class U>
  __device__ void fetch(const U* row, char* slots) const {
#pragma unroll
    for (int k = 0; k < E / V; ++k)
      if (inside(k * V))
#pragma unroll
        for (int j = 0; j < V; j += kVector<U>)
          __pipeline_memcpy_async(slot<U>(slots, k * V + j), row + column(k * V) + j, 16);
  }
  template <class U, class Out>
  __device__ void take(char* slots, Out (&x)[E]) const {
#pragma unroll
    for (int k = 0; k < E / V; ++k)
#pragma unroll
      for (int j = 0; j < V; j += kVector<U>) {
        Out piece[kVector<U>] = {};
        if (inside(k * V)) cuda::load<kVector<U>>(slot<U>(slots, k * V + j), piece);
#pragma unroll
        for (int i = 0; i < kVector<U>; ++i) x[k * V + j + i] = piece[i];
      }
  }
  // Vectors of 16 bytes, those of neighbours side by side.
  template <class U>
  static __device__ U* slot(char* slots, int e) {
    return reinterpret_cast<U*>(slots + (e / kVector<U> * blockDim.x + threadIdx.x) * 16);
  }

  template <class U, class In>
  __device__ void store(U* row, const In (&x)[E]) const {
    if (vectors) {
#pragma unroll
      for (int k = 0; k < E / V; ++k) {
        In piece[V];
#pragma unroll
        for (int j = 0; j < V; ++j) piece[j] = x[k * V + j];
        if (inside(k * V)) store_global<V>(row + column(k * V), piece);
      }
    } else {
#pragma unroll
      for (int e = 0; e < E; ++e)
        if (inside(e)) row[column(e)] = U(x[e]);
    }
  }
};

// The sums of K values each over `Threads` threads side by side, at most a warp, in a fixed order, for all of them.
template <int Threads, int K>
__device__ void sum_over_lanes(float (&s)[K]) {
#pragma unroll
  for (int offset = Threads / 2; offset > 0; offset /= 2)
#pragma unroll
    for (int k = 0; k < K; ++k) s[k] += __shfl_xor_sync(~0u, s[k], offset);
}

// The same over more threads, who are the whole block. Calls that follow one another without a barrier between them
// take turns with slot 0 and 1, or differ in K: whoever writes a slot again has met, in between, all who read it.
template <int Threads, int K>
__device__ void sum_over_threads(float (&s)[K], int slot = 0) {
  sum_over_lanes<std::min(Threads, 32)>(s);
  if constexpr (Threads > 32) {
    __shared__ float parts[2][Threads / 32][K];
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int k = 0; k < K; ++k) parts[slot][threadIdx.x / 32][k] = s[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < Threads / 32; ++w) sum += parts[slot][w][k];
      s[k] = sum;
    }
  }
}

// The same over the blocks of a cluster, each of `Threads`: a warp writes its sums into the shared memory of every
// block. Before the first call the blocks have met.
constexpr int kMostBlocks = 8;  // of a cluster: as many as every GPU takes

#if NNFAST_HOPPER
template <int Threads, int K>
__device__ void sum_over_cluster(const cooperative_groups::cluster_group& cluster, float (&s)[K], int slot) {
  constexpr int kWarps = Threads / 32;
  __shared__ float parts[2][K][kMostBlocks * kWarps];
  const int lane = threadIdx.x % 32, blocks = cluster.num_blocks();
  sum_over_lanes<32>(s);
  if (lane < blocks)
#pragma unroll
    for (int k = 0; k < K; ++k)
      *cluster.map_shared_rank(&parts[slot][k][cluster.block_rank() * kWarps + threadIdx.x / 32], lane) = s[k];
  cluster.sync();
#pragma unroll
  for (int k = 0; k < K; ++k) s[k] = 0;
  for (int i = lane; i < blocks * kWarps; i += 32)
#pragma unroll
    for (int k = 0; k < K; ++k) s[k] += parts[slot][k][i];
  sum_over_lanes<32>(s);
}
#endif

// ---- sums over rows, in two steps without atomics, so that a result repeats to the bit ----

// First step, where a row does not fit into registers or nothing else is done with it: tiles of kTileRows x 32 V
// columns walk down the rows. body(row, columns, s) adds a row to the K sums; s is then written to
// parts[k][blockIdx.y], rows of n.
constexpr int kTileRows = 8;
constexpr int kTileThreads = 32 * kTileRows;
constexpr int64_t kRowsPerPart = 64;  // rows a block sums at the least; a measurement should settle it
constexpr int64_t kMaxParts = 512;

inline int64_t tile_parts(int64_t rows) {
  return std::max<int64_t>(1, std::min(kMaxParts, (rows + kRowsPerPart - 1) / kRowsPerPart));
}
template <class T>
dim3 tile_grid(int64_t rows, int64_t n) {
  const int64_t width = 32 * kVector<T>;
  return dim3((n + width - 1) / width, tile_parts(rows));
}

template <class T, int K, class Body>
__device__ void sum_tile(int64_t rows, int64_t n, bool vectors, float* parts, Body body) {
  constexpr int V = kVector<T>;
  const int64_t first = int64_t(blockIdx.x) * 32 * V;
  const int width = n - first < 32 * V ? int(n - first) : 32 * V;
  const int lane = threadIdx.x % 32, line = threadIdx.x / 32;
  const Columns<T, 32, V> columns{lane, width, vectors};
  float s[K][V] = {};
  for (int64_t row = int64_t(blockIdx.y) * kTileRows + line; row < rows; row += int64_t(gridDim.y) * kTileRows)
    body(row * n + first, row, first, columns, s);
  __shared__ float lines[kTileRows][K][V][32];
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int v = 0; v < V; ++v) lines[line][k][v][lane] = s[k][v];
  __syncthreads();
  if (line >= K) return;  // warp k adds up the lines of sum k
  float total[V] = {};
#pragma unroll
  for (int l = 0; l < kTileRows; ++l)
#pragma unroll
    for (int v = 0; v < V; ++v) total[v] += lines[l][line][v][lane];
  float* part = parts + (int64_t(line) * gridDim.y + blockIdx.y) * n + first;
  columns.store(part, total);
}

// Second step: out[blockIdx.y][column] = the sum of `count` parts.
constexpr int kSumLines = 16;

// Static, for files are built for different architectures: nvcc 12 may merge what they share, and a launch would then
// find the code of a file that has none for this GPU.
template <class Out>
static __global__ void __launch_bounds__(32 * kSumLines)
    sum_parts_kernel(const float* parts, int64_t count, int64_t n, Out* first, Out* second) {
  after_the_kernel_before();
  const int lane = threadIdx.x % 32, line = threadIdx.x / 32;
  const int64_t column = int64_t(blockIdx.x) * 32 + lane;
  Out* out = blockIdx.y ? second : first;
  if (!out) return;
  parts += blockIdx.y * count * n;
  float s = 0;
  if (column < n)
#pragma unroll 4
    for (int64_t k = line; k < count; k += kSumLines) s += parts[k * n + column];
  __shared__ float lines[kSumLines][32];
  lines[line][lane] = s;
  __syncthreads();
  if (line || column >= n) return;
  float total = 0;
#pragma unroll
  for (int l = 0; l < kSumLines; ++l) total += lines[l][lane];
  out[column] = Out(total);
}

static inline cudaError_t sum_parts(
    const float* parts, int64_t count, int64_t n, DType out, void* first, void* second, cudaStream_t stream) {
  if (!n || (!first && !second)) return cudaSuccess;
  return visit(out, [&](auto o) {
    using Out = decltype(o);
    const auto kernel = sum_parts_kernel<Out>;
    const Launch how{dim3((n + 31) / 32, second ? 2 : 1), 32 * kSumLines, 0, stream, 1, compiled_for_hopper(kernel)};
    return launch(kernel, how, parts, count, n, static_cast<Out*>(first), static_cast<Out*>(second));
  });
}

}  // namespace nnfast::cuda
