// AdamW on a CPU: the tensors of a group in chunks, which the threads take in turn.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../gate/paths.h"
#include "../ops/op.h"
#include "cpu.h"

namespace nnfast {
namespace {

Path served("adamw_"), reorders("adamw_.reordered_gradient"), in_threads("adamw_.threads");
// Elements a thread takes at the least: their memory traffic outweighs waking the thread.
Threshold grain("adamw_.grain", 16384);
// Elements of a tensor that are updated at a time.
Threshold chunk_elements("adamw_.chunk", 65536);

void adamw_cpu(
    at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
    at::TensorList max_exp_avg_sqs, at::TensorList state_steps, double lr, double beta1, double beta2,
    double weight_decay, double eps, bool maximize, const OptTensor& grad_scale, const OptTensor& found_inf) {
  const size_t n = params.size();
  const bool amsgrad = !max_exp_avg_sqs.empty();
  bool covered = cpu_kernels() && grads.size() == n && exp_avgs.size() == n && exp_avg_sqs.size() == n &&
                 state_steps.size() == n && (!amsgrad || max_exp_avg_sqs.size() == n);
  const Tensor none;
  for (size_t i = 0; covered && i < n; ++i)
    covered = covers_adamw(
        params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], amsgrad ? max_exp_avg_sqs[i] : none, state_steps[i]);
  TORCH_CHECK_NOT_IMPLEMENTED(covered, "nnfast::adamw_ does not cover this call; nnfast.optim.AdamW hands it to torch");
  served.taken();
  if (defined(found_inf) && found_inf->item<double>() != 0) return;
  const double scale = defined(grad_scale) ? grad_scale->item<double>() : 1.0;

  const int64_t kChunk = chunk_elements;
  std::vector<AdamWTensor> tensors;
  std::vector<int64_t> ends;  // the number of chunks up to and with each tensor
  std::vector<std::pair<Tensor, Tensor>> reordered;
  tensors.reserve(n);
  ends.reserve(n);
  int64_t total = 0, elements = 0;
  AdamWStep<double> step(lr, beta1, beta2, eps, weight_decay, 1);
  double t = 1;
  for (size_t i = 0; i < n; ++i) {
    // Most parameters are at the same step: its powers are taken once.
    auto& count = *state_steps[i].mutable_data_ptr<float>();
    count += 1;
    if (count != t) step = AdamWStep<double>(lr, beta1, beta2, eps, weight_decay, t = count);
    Tensor grad = grads[i];
    if (grad.strides() != params[i].strides()) {
      reorders.taken();
      grad = at::empty_like(params[i]).copy_(grad);
      reordered.emplace_back(grads[i], grad);
    }
    tensors.push_back(
        {cpu_dtype(params[i]), params[i].mutable_data_ptr(), grad.mutable_data_ptr(), exp_avgs[i].mutable_data_ptr(),
         exp_avg_sqs[i].mutable_data_ptr(), amsgrad ? max_exp_avg_sqs[i].mutable_data_ptr() : nullptr, maximize, scale,
         step});
    elements += params[i].numel();
    ends.push_back(total += (params[i].numel() + kChunk - 1) / kChunk);
  }

  // The threads take chunks in turn, and so stay close to each other in memory.
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), elements / grain);
  const auto in_turn = [&](int64_t thread, int64_t step) {
    size_t i = 0;
    for (int64_t chunk = thread; chunk < total; chunk += step) {
      while (ends[i] <= chunk) ++i;
      const int64_t begin = (chunk - (i ? ends[i - 1] : 0)) * kChunk;
      cpu_kernels()->adamw(tensors[i], begin, std::min(begin + kChunk, params[i].numel()));
    }
  };
  if (threads < 2) {
    in_turn(0, 1);
  } else {
    in_threads.taken();
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) in_turn(thread, threads);
    });
  }
  if (scale != 1)
    for (auto& [theirs, ours] : reordered) theirs.copy_(ours);
}

void adamw_tensor_lr_cpu(
    at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
    at::TensorList max_exp_avg_sqs, at::TensorList state_steps, const Tensor& lr, double beta1, double beta2,
    double weight_decay, double eps, bool maximize, const OptTensor& grad_scale, const OptTensor& found_inf) {
  adamw_cpu(
      params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, lr.item<double>(), beta1, beta2, weight_decay,
      eps, maximize, grad_scale, found_inf);
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CPU, m) {
  m.impl("adamw_", adamw_cpu);
  m.impl("adamw_.tensor_lr", adamw_tensor_lr_cpu);
}

}  // namespace nnfast
