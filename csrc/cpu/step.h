// How a step of an optimizer runs on a CPU: the tensors of a group in chunks, of which each thread takes a run.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <vector>

#include "../ops/optimizer.h"
#include "../ops/paths.h"
#include "cpu.h"

namespace nnfast {

// Elements a thread takes at the least: their memory traffic outweighs waking the thread; and those of a chunk.
extern Threshold step_grain, step_chunk;
extern Path step_threads, reordered_gradient, in_order;

// Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014: the finalizer.
inline uint64_t mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

inline int64_t elements_of(at::TensorList tensors) {
  int64_t elements = 0;
  for (const auto& t : tensors) elements += t.numel();
  return elements;
}

// Calls f(tensor, begin, end, chunk) for each chunk of each tensor, `chunk` counting through all of them. Each thread
// has a run of them: what prefetches memory follows it longest that way.
template <class F>
void for_each_chunk(at::TensorList tensors, F f) {
  const int64_t size = step_chunk, elements = elements_of(tensors);
  // The chunks whose first element is one of [from, to) of all.
  const auto run = [&](int64_t from, int64_t to) {
    int64_t first = 0, chunk = 0;
    for (size_t i = 0; i < tensors.size() && first < to; ++i) {
      const int64_t n = tensors[i].numel();
      const int64_t skipped = std::min(at::ceil_div(std::max<int64_t>(from - first, 0), size), at::ceil_div(n, size));
      for (int64_t begin = skipped * size; begin < n && first + begin < to; begin += size)
        f(i, begin, std::min(begin + size, n), chunk + begin / size);
      chunk += at::ceil_div(n, size);
      first += n;
    }
  };
  const int64_t threads = threads_for(elements, step_grain);
  if (threads < 2) return run(0, elements);
  step_threads.taken();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      run(elements * thread / threads, elements * (thread + 1) / threads);
  });
}

// Whether two of the tensors, which have no gaps, share memory and threads would take them side by side.
inline bool overlap(at::TensorList tensors) {
  if (threads_for(elements_of(tensors), step_grain) < 2) return false;
  std::vector<std::pair<const char*, const char*>> ranges;
  ranges.reserve(tensors.size());
  for (const auto& t : tensors)
    if (const size_t bytes = t.numel() * t.element_size()) {
      const auto* const begin = (const char*)t.const_data_ptr();
      ranges.emplace_back(begin, begin + bytes);
    }
  if (!std::is_sorted(ranges.begin(), ranges.end())) std::sort(ranges.begin(), ranges.end());
  const auto meet = [](const auto& a, const auto& b) { return b.first < a.second; };
  return std::adjacent_find(ranges.begin(), ranges.end(), meet) != ranges.end();
}

// scalars(lr, t): the numbers of the formula at step t. Whatever can fail comes before the first change.
template <class Scalars, class Call, class Form>
void step_cpu(
    const Call& a, void (*Kernels::*kernel)(const StepOf<Scalars>&, int64_t, int64_t), Path& path, Form form) {
  const auto number = [](const OptTensor& t, double otherwise) {
    if (!defined(t)) return otherwise;
    TORCH_CHECK_NOT_IMPLEMENTED(t->numel() == 1, "nnfast::", Call::kName, ": lr and the like are one number");
    return t->template item<double>();
  };
  check_covered(cpu_kernels() && covers_call(a), Call::kName);
  const double lr = number(a.tensor_lr, a.lr), grad_scale = number(a.grad_scale, 1), coef = number(a.clip_coef, 1);
  path.taken();
  if (number(a.found_inf, 0) != 0) return;

  const size_t n = a.params.size(), steps = a.state_steps.size();
  std::vector<StepOf<Scalars>> tensors(n);
  std::vector<Tensor> reordered;
  double t = 1;
  Scalars scalars = form(lr, t);
  const auto count = [&](size_t i) -> float& { return *a.state_steps[i].template mutable_data_ptr<float>(); };
  // Most parameters are at the same step: its powers are taken once.
  const auto form_for = [&](size_t i) {
    if (const double next = steps ? count(i) + 1.0f : 1; next != t) scalars = form(lr, t = next);
    tensors[i].scalars = scalars;
    // Another stream for every step and tensor; the seed is another for every group.
    if (tensors[i].stochastic) tensors[i].seed = mixed(mixed((uint64_t)*a.rounding_seed + (uint64_t)t) + i);
    return (float)t;
  };
  std::vector<float> counts(steps);  // after this step
  for (size_t i = 0; i < n; ++i) {
    const Tensor& param = a.params[i];
    const Tensor* grad = &a.grads[i];
    if (grad->strides() != param.strides()) {
      // The unscaled gradient would have to be written back in its own order, which is one more thing that can fail.
      TORCH_CHECK_NOT_IMPLEMENTED(
          grad_scale == 1, "nnfast::", Call::kName, ": grad_scale with a gradient of other strides");
      reordered_gradient.taken();
      reordered.push_back(at::empty_like(param).copy_(*grad));
      grad = &reordered.back();
    }
    auto& to = tensors[i];
    to.dtype = to.state_dtype = cpu_dtype(param);
    to.param = param.mutable_data_ptr();
    to.grad = grad->mutable_data_ptr();
    for (size_t k = 0; k < Call::kState.size(); ++k) {
      if (a.state[k].empty() || !a.state[k][i].defined()) continue;
      const Tensor& s = a.state[k][i];
      if (k == Call::kMaster) {
        to.master = s.template mutable_data_ptr<int16_t>();
      } else {
        to.state[k] = s.mutable_data_ptr();
        to.state_dtype = cpu_dtype(s);
      }
    }
    to.maximize = a.maximize;
    to.grad_scale = grad_scale;
    to.clip_coef = coef;
    to.stochastic = a.rounding_seed.has_value();
    const float at = form_for(i);
    if (steps) counts[i] = at;
  }
  const auto update = cpu_kernels()->*kernel;
  // Tensors are stepped one after another, as torch does it, where parameters share memory, or gradients that
  // grad_scale rewrites, or where two parameters share a count of steps (which shows as a count that has moved
  // already).
  bool apart = !overlap(a.params) && (grad_scale == 1 || !overlap(a.grads));
  for (size_t i = 0; i < steps && apart; ++i) {
    if (count(i) + 1.0f == counts[i]) {
      count(i) += 1;
      continue;
    }
    apart = false;
    while (i--) count(i) = counts[i] - 1.0f;
    break;
  }
  if (apart)
    return for_each_chunk(
        a.params, [&](size_t i, int64_t begin, int64_t end, int64_t) { update(tensors[i], begin, end); });
  in_order.taken();
  for (size_t i = 0; i < n; ++i) {
    const float at = form_for(i);
    if (steps) count(i) = at;
    for_each_chunk(
        a.params.slice(i, 1), [&](size_t, int64_t begin, int64_t end, int64_t) { update(tensors[i], begin, end); });
  }
}

}  // namespace nnfast
