// The host code of csrc/cuda, as it is, over gpu.cpp and the headers in c10/cuda; and what tests/emulated.py sets.
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <torch/library.h>

#include "runtime.h"

namespace emulate {
// Whether the host code below takes its tensors of one number (counts, rates) for the GPU's: all are this CPU's.
bool scalars_on_device = false;
inline c10::Device host() { return c10::Device(scalars_on_device ? c10::kMeta : c10::kCPU); }
inline c10::Device gpu() { return c10::Device(scalars_on_device ? c10::kCPU : c10::kMeta); }
}  // namespace emulate

// Memory of this CPU is all there is, and none of it is pinned.
#define pinned_memory(wanted) pinned_memory(false)
#define is_cpu() device().operator==(emulate::host())
#define is_cuda() device().operator==(emulate::gpu())
#include "cuda/adamw.cpp"
#include "cuda/clip_grad.cpp"
#include "cuda/layer_norm.cpp"
#include "cuda/linear_gelu.cpp"
#include "cuda/rmsprop.cpp"
#include "cuda/sgd.cpp"
#undef is_cpu
#undef is_cuda

namespace {

bool capturing = false;

// The CPU's allocator, until it shall fail.
class Failing final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (!emulate::memory_left()) C10_THROW_ERROR(OutOfMemoryError, "emulate: no memory");
    return real_->allocate(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return real_->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override { real_->copy_data(to, from, bytes); }

 private:
  c10::Allocator* real_ = c10::GetCPUAllocator();
};

[[maybe_unused]] const bool installed = [] {
  c10::SetAllocator(c10::kCPU, new Failing, 1);
  return true;
}();

}  // namespace

namespace c10::cuda {
namespace {
int current = 0, side = 0;  // whose addresses are those of streams
int* on = &current;
CUDAStream stream(int* s) { return {reinterpret_cast<cudaStream_t>(s)}; }
}  // namespace
CUDAStream getCurrentCUDAStream(DeviceIndex) { return stream(on); }
CUDAStream getStreamFromExternal(cudaStream_t s, DeviceIndex) { return {s}; }
CUDAStreamGuard::CUDAStreamGuard(CUDAStream s) { on = reinterpret_cast<int*>(s.id); }
CUDAStreamGuard::~CUDAStreamGuard() { on = &current; }
CaptureStatus currentStreamCaptureStatusMayInitCtx() {
  return capturing && on == &current ? CaptureStatus::Active : CaptureStatus::None;
}
}  // namespace c10::cuda

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* made, unsigned) {
  *made = reinterpret_cast<cudaStream_t>(&c10::cuda::side);
  return cudaSuccess;
}

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void emulate_device(int multiprocessors, int shared_memory) {
  emulate::set_device(multiprocessors, shared_memory);
}
EXPORT void emulate_scalars_on_device(bool on) { emulate::scalars_on_device = on; }
EXPORT void emulate_capturing(bool on) { capturing = on; }
// After so many allocations of this thread the next one fails; a negative number: none does.
EXPORT void emulate_memory_left(int count) { emulate::set_memory_left(count); }
EXPORT void emulate_order(unsigned seed) { emulate::set_order(seed); }
EXPORT int emulate_launched(size_t* offsets, int room) { return emulate::kernels_launched(offsets, room); }
EXPORT void emulate_images(bool there) { emulate::set_images(there); }
EXPORT void emulate_clusters(int device, int ptx_version, int count, bool launches) {
  emulate::set_clusters(device, ptx_version, count, launches);
}
EXPORT bool emulate_load_on(int device) { return nnfast::cuda_kernels_load(device); }
