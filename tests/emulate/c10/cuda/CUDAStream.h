// What csrc/cuda's host code finds in the place of torch's headers for CUDA: a device that is this CPU. Its ops are
// registered at the CPU's key.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#define C10_CUDA_CHECK(call)                                                   \
  do {                                                                         \
    const cudaError_t error = call;                                            \
    TORCH_CHECK(error == cudaSuccess, "CUDA error ", static_cast<int>(error)); \
  } while (0)

namespace c10::cuda {

struct CUDAStream {
  cudaStream_t id;
  operator cudaStream_t() const { return id; }
  bool operator==(const CUDAStream& other) const { return id == other.id; }
  c10::Device device() const { return c10::Device(c10::kCPU); }
};
CUDAStream getCurrentCUDAStream(c10::DeviceIndex = -1);

CUDAStream getStreamFromExternal(cudaStream_t, c10::DeviceIndex);
// Makes its stream the current one while it lives.
struct CUDAStreamGuard {
  explicit CUDAStreamGuard(CUDAStream);
  ~CUDAStreamGuard();
};

struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
  explicit CUDAGuard(c10::DeviceIndex) {}
};

}  // namespace c10::cuda

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(ns, key, m) _TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)
