// Steps of optimizers on a CUDA device: the table that tells one launch about every tensor, and how it is filled.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

#include <cmath>
#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <vector>

#include "../ops/optimizer.h"
#include "cuda.h"

namespace nnfast::cuda {

// A table as it lies on the device: the tensors, then their chunks.
struct KeptTable {
  c10::cuda::CUDAStream stream;  // of the launches that it serves
  std::vector<StepTensor> tensors;
  int64_t chunks;
  Tensor memory;
  char* device = nullptr;  // where the memory begins

  bool serves(const c10::cuda::CUDAStream& s, const std::vector<StepTensor>& t) const {
    return stream == s && tensors.size() == t.size() &&
           std::memcmp(tensors.data(), t.data(), t.size() * sizeof(StepTensor)) == 0;
  }
};

// A table is never changed: while tensors stay where they are and advance together, it stays right, and else another
// one is made. Those of the latest steps are kept, for several groups and for gradients that come back to one of a few
// places.
constexpr size_t kTables = 32;

// Where the tables of graphs are filled. Not a stream of torch's pool, for those that are being captured come from it.
inline c10::cuda::CUDAStream side_stream(c10::DeviceIndex device) {
  static std::mutex mutex;
  static auto& streams = *new std::map<c10::DeviceIndex, cudaStream_t>;
  const std::lock_guard lock(mutex);
  cudaStream_t& stream = streams[device];
  if (!stream) C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return c10::cuda::getStreamFromExternal(stream, device);
}

inline void upload(KeptTable& table, bool capturing) {
  const size_t head = table.tensors.size() * sizeof(StepTensor), bytes = head + table.chunks * sizeof(StepChunk);
  const Tensor on_host =
      at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions(at::kByte).pinned_memory(!capturing));
  char* const host = static_cast<char*>(on_host.mutable_data_ptr());
  std::memcpy(host, table.tensors.data(), head);
  auto* chunk = reinterpret_cast<StepChunk*>(host + head);
  for (uint32_t i = 0; i < table.tensors.size(); ++i)
    for (uint32_t k = 0; k < table.tensors[i].chunks; ++k) *chunk++ = {i, k};

  const auto fill = [&] {
    table.memory = at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions(at::kByte).device(table.stream.device()));
    table.device = static_cast<char*>(table.memory.mutable_data_ptr());
    table.memory.copy_(on_host, /*non_blocking=*/!capturing);
  };
  if (!capturing) return fill();
  // The table of a graph is filled now, beside the stream that is being captured, and not by the graph: a replay then
  // needs nothing of the host's. Nor can it lie in the graph's own memory, which earlier kernels of the graph may use.
  // Nobody says when the graph is gone, so that the table stays: 80 bytes a tensor and 8 a chunk for each capture.
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  const c10::cuda::CUDAStreamGuard side(side_stream(table.stream.device().index()));
  fill();
}

// The table for these tensors, for launches on this stream that come after. The memory of one that is dropped goes back
// to torch's allocator in the order of its stream.
inline StepTable with_table(std::vector<StepTensor> tensors, const c10::cuda::CUDAStream& stream) {
  static std::mutex mutex;
  static auto& tables = *new std::list<KeptTable>;   // neither is ever freed: at exit there
  static auto& captured = *new std::vector<Tensor>;  // may be no driver left to free memory
  const bool capturing = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  std::list<KeptTable> dropped;  // goes after the lock: freeing may wait for Python's lock too
  std::unique_lock lock(mutex);
  auto found = tables.begin();
  while (found != tables.end() && !found->serves(stream, tensors)) ++found;
  if (found == tables.end()) {
    int64_t chunks = 0;
    for (const auto& t : tensors) chunks += t.chunks;
    // Only one that is filled is kept: a step that failed here fills its own again. Filled without the lock, for an
    // allocation may wait for Python's lock (as where torch records its memory), whose holder may wait for this one.
    KeptTable table{stream, std::move(tensors), chunks};
    lock.unlock();
    upload(table, capturing);
    lock.lock();
    tables.push_front(std::move(table));
    if (tables.size() > kTables) dropped.splice(dropped.end(), tables, std::prev(tables.end()));
  } else {
    tables.splice(tables.begin(), tables, found);
  }
  const KeptTable& table = tables.front();
  if (capturing) captured.push_back(table.memory);
  return {
      reinterpret_cast<StepTensor*>(table.device),
      reinterpret_cast<const StepChunk*>(table.device + table.tensors.size() * sizeof(StepTensor)), table.chunks};
}

inline bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline void set_size(StepTensor& t, int64_t size) {
  t.size = size;
  t.chunks = static_cast<uint32_t>(std::max<int64_t>(1, (size + kStepChunk - 1) / kStepChunk));
}

inline const float* device_float(const OptTensor& t, const Tensor& param, const char* op, const char* name) {
  if (!defined(t)) return nullptr;
  TORCH_CHECK_NOT_IMPLEMENTED(
      t->device() == param.device() && t->scalar_type() == at::kFloat && t->numel() == 1, "nnfast::", op, ": ", name,
      " must be one float on the parameters' device");
  return t->const_data_ptr<float>();
}

// numbers(lr, t): what the kernel is told, with what is known at step t.
template <class Numbers, class Call, class Form>
void step_cuda(const Call& c, cudaError_t (*kernel)(const Step<Numbers>&, cudaStream_t), Form numbers) {
  const auto& [params, grads, steps] = std::tie(c.params, c.grads, c.state_steps);
  const size_t n = params.size();
  if (!n) return;
  const bool on_device = !steps.empty() && !steps[0].is_cpu();
  bool covered = covers_call(c, /*mixed_dtypes=*/true) && !c.rounding_seed;
  if constexpr (Call::kMaster < Call::kState.size()) covered = covered && c.state[Call::kMaster].empty();
  for (size_t i = 0; covered && i < n; ++i)
    covered = params[i].device() == params[0].device() && (steps.empty() || steps[i].is_cpu() != on_device);
  check_covered(covered, Call::kName);
  // A learning rate on the device is read there.
  Step<Numbers> a{};
  a.lr = c.lr;
  if (defined(c.tensor_lr)) {
    const auto& t = *c.tensor_lr;
    const bool readable = t.is_cuda() && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble);
    TORCH_CHECK_NOT_IMPLEMENTED(
        t.numel() == 1 && (t.is_cpu() || (readable && t.device() == params[0].device())), "nnfast::", Call::kName,
        ": lr must be one number, on the CPU, or in float or double on the parameters' device");
    if (t.is_cpu()) {
      a.lr = t.template item<double>();
    } else {
      a.device_lr = t.const_data_ptr();
      a.device_lr_is_double = t.scalar_type() == at::kDouble;
    }
  }
  const On on(params[0]);
  a.grad_scale = device_float(c.grad_scale, params[0], Call::kName, "grad_scale");
  a.found_inf = device_float(c.found_inf, params[0], Call::kName, "found_inf");
  a.clip_coef = device_float(c.clip_coef, params[0], Call::kName, "clip_coef");
  a.maximize = c.maximize;
  // Counts on the CPU advance here, so found_inf must be read; torch keeps them on the device wherever it passes that.
  if (!on_device && !steps.empty() && a.found_inf && c.found_inf->template item<float>() != 0) return;

  std::vector<StepTensor> tensors(n);  // zeros, between the members too: they are compared as bytes
  std::vector<std::pair<Tensor, Tensor>> reordered;
  a.step = 1;
  for (size_t i = 0; i < n; ++i) {
    auto& t = tensors[i];
    Tensor grad = grads[i];
    if (grad.strides() != params[i].strides()) {
      grad = at::empty_like(params[i], grad.options()).copy_(grad);
      reordered.emplace_back(grads[i], grad);
    }
    t.param = params[i].mutable_data_ptr();
    t.grad = grad.mutable_data_ptr();
    t.param_dtype = t.state_dtype = dtype_of(params[i]);
    t.grad_dtype = dtype_of(grad);
    t.aligned = on_16_bytes(t.param) && on_16_bytes(t.grad);
    for (size_t k = 0; k < std::min<size_t>(3, Call::kState.size()); ++k) {
      if (c.state[k].empty()) continue;
      t.state[k] = c.state[k][i].mutable_data_ptr();
      t.state_dtype = dtype_of(c.state[k][i]);
      t.aligned = t.aligned && on_16_bytes(t.state[k]);
    }
    if (on_device) {
      t.step = steps[i].template mutable_data_ptr<float>();
    } else if (!steps.empty()) {
      const float next = *steps[i].template const_data_ptr<float>() + 1;
      if (i == 0) a.step = next;
      t.step_offset = next - a.step;
    }
    set_size(t, params[i].numel());
  }
  a.table = with_table(std::move(tensors), on.stream);
  a.numbers = numbers(a.lr, a.step);
  if (on_device) a.step = 0;
  C10_CUDA_CHECK(kernel(a, on.stream));
  // The counts advance once nothing can fail any more.
  if (!on_device)
    for (const auto& s : steps) *s.template mutable_data_ptr<float>() += 1;
  if (a.grad_scale)
    for (auto& [theirs, ours] : reordered) theirs.copy_(ours);
}

}  // namespace nnfast::cuda
