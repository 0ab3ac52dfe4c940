// AdamW on a CUDA device: the table that tells one launch of adamw.cu about every tensor.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <torch/library.h>

#include <cstring>
#include <list>
#include <mutex>
#include <tuple>
#include <vector>

#include "../ops/optimizer.h"
#include "cuda.h"

namespace nnfast::cuda {
namespace {

// A table as it lies on the device: the tensors, then their chunks.
struct Table {
  c10::cuda::CUDAStream stream;  // that its memory belongs to, and that filled it
  std::vector<AdamWTensor> tensors;
  int64_t chunks;
  Tensor memory;           // undefined for a table made for a CUDA graph
  char* device = nullptr;  // where it lies

  bool serves(const c10::cuda::CUDAStream& s, const std::vector<AdamWTensor>& t) const {
    return stream == s && tensors.size() == t.size() &&
           std::memcmp(tensors.data(), t.data(), t.size() * sizeof(AdamWTensor)) == 0;
  }
};

// A table is never changed: while tensors stay where they are and advance together, it stays right, and else another
// one is made. Those of the latest steps are kept, for several groups and for gradients that come back to one of a few
// places.
constexpr size_t kTables = 32;

void upload(Table& table, bool capturing) {
  const size_t head = table.tensors.size() * sizeof(AdamWTensor), bytes = head + table.chunks * sizeof(AdamWChunk);
  Tensor pinned;
  std::vector<char> pageable;
  char* host;
  if (capturing) {
    pageable.resize(bytes);
    host = pageable.data();
  } else {
    pinned = at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions(at::kByte).pinned_memory(true));
    host = static_cast<char*>(pinned.mutable_data_ptr());
  }
  std::memcpy(host, table.tensors.data(), head);
  auto* chunk = reinterpret_cast<AdamWChunk*>(host + head);
  for (uint32_t i = 0; i < table.tensors.size(); ++i)
    for (uint32_t k = 0; k < table.tensors[i].chunks; ++k) *chunk++ = {i, k};

  if (!capturing) {
    table.memory = at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions(at::kByte).device(table.stream.device()));
    table.device = static_cast<char*>(table.memory.mutable_data_ptr());
    table.memory.copy_(pinned, /*non_blocking=*/true);
    return;
  }
  // The table of a graph is filled now, beside the stream that is being captured, and not by the graph: a replay then
  // needs nothing of the host's. Nor can it lie in the graph's own memory, which earlier kernels of the graph may use.
  // Nobody says when the graph is gone, so that the table stays: 72 bytes a tensor and 8 a chunk for each capture.
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  cudaStream_t side;
  C10_CUDA_CHECK(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking));
  void* memory = nullptr;
  C10_CUDA_CHECK(cudaMalloc(&memory, bytes));
  C10_CUDA_CHECK(cudaMemcpyAsync(memory, host, bytes, cudaMemcpyHostToDevice, side));
  C10_CUDA_CHECK(cudaStreamSynchronize(side));
  C10_CUDA_CHECK(cudaStreamDestroy(side));
  table.device = static_cast<char*>(memory);
}

// The table for these tensors, for launches on this stream that come after. The memory of one that is dropped goes back
// to torch's allocator in the order of its stream.
AdamW with_table(std::vector<AdamWTensor> tensors, const c10::cuda::CUDAStream& stream) {
  static std::mutex mutex;
  static auto& tables = *new std::list<Table>;       // neither is ever freed: at exit there
  static auto& captured = *new std::vector<Tensor>;  // may be no driver left to free memory
  const bool capturing = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  const std::lock_guard lock(mutex);
  auto found = tables.begin();
  while (found != tables.end() && !found->serves(stream, tensors)) ++found;
  if (found == tables.end()) {
    int64_t chunks = 0;
    for (const auto& t : tensors) chunks += t.chunks;
    // Only one that is filled is kept: a step that failed here fills its own again.
    Table table{stream, std::move(tensors), chunks};
    upload(table, capturing);
    tables.push_front(std::move(table));
    if (tables.size() > kTables) tables.pop_back();
  } else {
    tables.splice(tables.begin(), tables, found);
  }
  const Table& table = tables.front();
  if (capturing && table.memory.defined()) captured.push_back(table.memory);
  AdamW a{};
  a.tensors = reinterpret_cast<AdamWTensor*>(table.device);
  a.chunks = reinterpret_cast<const AdamWChunk*>(table.device + table.tensors.size() * sizeof(AdamWTensor));
  a.chunk_count = table.chunks;
  return a;
}

const float* device_float(const OptTensor& t, const Tensor& param, const char* name) {
  if (!defined(t)) return nullptr;
  TORCH_CHECK_NOT_IMPLEMENTED(
      t->device() == param.device() && t->scalar_type() == at::kFloat && t->numel() == 1, "nnfast::adamw_: ", name,
      " must be one float on the parameters' device");
  return t->const_data_ptr<float>();
}

void adamw_cuda(const AdamWCall& c) {
  const auto& [params, grads, lists, state_steps] = std::tie(c.params, c.grads, c.state, c.state_steps);
  const auto &exp_avgs = lists[0], &exp_avg_sqs = lists[1], &max_exp_avg_sqs = lists[2];
  const size_t n = params.size();
  if (!n) return;
  const bool amsgrad = !max_exp_avg_sqs.empty(), on_device = !state_steps.empty() && !state_steps[0].is_cpu();
  bool covered = covers_call(c, /*mixed_dtypes=*/true) && lists[AdamWCall::kMaster].empty() && !c.rounding_seed &&
                 (c.decoupled_weight_decay || c.weight_decay == 0);
  for (size_t i = 0; covered && i < n; ++i)
    covered = params[i].device() == params[0].device() && state_steps[i].is_cpu() != on_device;
  TORCH_CHECK_NOT_IMPLEMENTED(covered, "nnfast::adamw_ does not cover this call; nnfast.optim.AdamW hands it to torch");
  // A learning rate on the device is read there.
  double lr = c.lr;
  const Tensor* device_lr = nullptr;
  if (defined(c.tensor_lr)) {
    const auto& t = *c.tensor_lr;
    const bool readable = t.is_cuda() && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble);
    TORCH_CHECK_NOT_IMPLEMENTED(
        t.numel() == 1 && (t.is_cpu() || (readable && t.device() == params[0].device())),
        "nnfast::adamw_: lr must be one number, on the CPU, or in float or double on the parameters' device");
    if (t.is_cpu())
      lr = t.item<double>();
    else
      device_lr = &t;
  }
  const On on(params[0]);
  const float *scale = device_float(c.grad_scale, params[0], "grad_scale"),
              *inf = device_float(c.found_inf, params[0], "found_inf"),
              *coef = device_float(c.clip_coef, params[0], "clip_coef");
  // Counts on the CPU advance there, so it must know; torch keeps them on the device wherever it passes found_inf.
  if (!on_device && inf && c.found_inf->item<float>() != 0) return;

  std::vector<AdamWTensor> tensors(n);  // zeros, between the members too: they are compared as bytes
  std::vector<std::pair<Tensor, Tensor>> reordered;
  const auto on_16_bytes = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  double first = 0;
  for (size_t i = 0; i < n; ++i) {
    auto& t = tensors[i];
    Tensor grad = grads[i];
    if (grad.strides() != params[i].strides()) {
      grad = at::empty_like(params[i], grad.options()).copy_(grad);
      reordered.emplace_back(grads[i], grad);
    }
    t.param = params[i].mutable_data_ptr();
    t.grad = grad.mutable_data_ptr();
    t.exp_avg = exp_avgs[i].mutable_data_ptr();
    t.exp_avg_sq = exp_avg_sqs[i].mutable_data_ptr();
    if (amsgrad) t.max_exp_avg_sq = max_exp_avg_sqs[i].mutable_data_ptr();
    if (on_device) {
      t.step = state_steps[i].mutable_data_ptr<float>();
    } else {
      const float next = *state_steps[i].const_data_ptr<float>() + 1;
      if (i == 0) first = next;
      t.step_offset = next - first;
    }
    t.size = params[i].numel();
    t.chunks = static_cast<uint32_t>(std::max<int64_t>(1, (t.size + kAdamWChunk - 1) / kAdamWChunk));
    t.param_dtype = dtype_of(params[i]);
    t.grad_dtype = dtype_of(grad);
    t.moments_dtype = dtype_of(exp_avgs[i]);
    t.aligned = on_16_bytes(t.param) && on_16_bytes(t.grad) && on_16_bytes(t.exp_avg) && on_16_bytes(t.exp_avg_sq) &&
                on_16_bytes(t.max_exp_avg_sq);
  }

  AdamW a = with_table(std::move(tensors), on.stream);
  a.lr = lr;
  a.beta1 = c.beta1;
  a.beta2 = c.beta2;
  a.weight_decay = c.weight_decay;
  a.eps = c.eps;
  a.maximize = c.maximize;
  a.grad_scale = scale;
  a.found_inf = inf;
  a.clip_coef = coef;
  a.step = first;
  if (device_lr) {
    a.device_lr = device_lr->const_data_ptr();
    a.device_lr_is_double = device_lr->scalar_type() == at::kDouble;
  } else if (!on_device) {
    a.scalars = AdamWStep<double>(lr, c.beta1, c.beta2, c.eps, c.weight_decay, first);
  }
  C10_CUDA_CHECK(cuda::adamw(a, on.stream));
  // The counts advance once nothing can fail any more.
  if (!on_device)
    for (const auto& s : state_steps) *s.mutable_data_ptr<float>() += 1;
  if (scale)
    for (auto& [theirs, ours] : reordered) theirs.copy_(ours);
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CUDA, m) { m.impl("adamw_", Flat<AdamWCall, adamw_cuda>::call); }

}  // namespace nnfast::cuda
