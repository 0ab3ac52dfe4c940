// CUDA's language and runtime for a .cu file of csrc/cuda that is compiled for a CPU, not by nvcc. Included before
// anything else. Each CUDA thread is a fiber; __syncthreads and the warp's shuffles are where fibers meet.
//
// The types bf16 and f16 and their conversions are NVIDIA's own, from the toolkit's headers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <type_traits>
#include <utility>

extern uint3 threadIdx, blockIdx;  // of the thread that is running
extern dim3 blockDim, gridDim;

namespace emulate {

// Runs body(), a call of `kernel`, in every thread of every block. Returns when all are done.
cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body);

// Waits until every thread of the block that has not ended is here.
void sync_block(const char* file, int line);
// Waits until every lane of the warp that `mask` names is here; gives the value that lane `from` brought.
uint32_t shuffle(unsigned mask, uint32_t value, int from, const char* file, int line);
int lane();

// Of the running thread's cluster.
int cluster_size();
int cluster_rank();
void sync_cluster(const char* file, int line);
ptrdiff_t to_shared_memory_of(int rank);  // from its own

// A vector on its way, or where a group of them ends.
struct Copy {
  uint4* to = nullptr;
  const uint4* from = nullptr;
  bool operator==(const Copy&) const = default;
};
std::deque<Copy>& copies();     // the running thread's
void wait_for_kernel_before();  // marks that this thread did

template <class T>
T shuffle_xor(unsigned mask, T value, int offset, const char* file, int line) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = shuffle(mask, bits, lane() ^ offset, file, line);
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void store(uint4* p, uint4 value) { *p = value; }
inline unsigned atomic_inc(unsigned* p, unsigned last) {
  const unsigned old = *p;
  *p = old >= last ? 0 : old + 1;
  return old;
}

}  // namespace emulate

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  return emulate::run(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(Params(args)...); });
}
template <class... Params>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, void (*kernel)(Params...)) {
  return cudaFuncGetAttributes(found, reinterpret_cast<const void*>(kernel));
}
template <class... Params>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, void (*)(Params...), int, size_t) {
  return *count = 4, cudaSuccess;
}
template <class... Params>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, void (*kernel)(Params...), const cudaLaunchConfig_t* config) {
  return cudaOccupancyMaxActiveClusters(count, reinterpret_cast<const void*>(kernel), config);
}
template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute name, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), name, value);
}

#define __CUDACC__
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// One thread of the system runs a block, so this is shared by a block's threads; and it goes together with `extern`.
#define __shared__ thread_local

#define __syncthreads() emulate::sync_block(__FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, offset) emulate::shuffle_xor(mask, value, offset, __FILE__, __LINE__)
#define __stwb(p, value) emulate::store(p, value)
#define __threadfence() ((void)0)  // blocks come in turn
#define cudaGridDependencySynchronize() emulate::wait_for_kernel_before()
#define cudaTriggerProgrammaticLaunchCompletion() ((void)0)  // kernels come in turn
#define atomicInc(p, last) emulate::atomic_inc(p, last)
