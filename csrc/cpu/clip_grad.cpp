// The norm of many tensors on a CPU, and their scaling.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "step.h"

namespace nnfast {
namespace {

Path normed("total_norm"), scaled("scale_");

bool covers_all(at::TensorList tensors) {
  return cpu_kernels() && std::all_of(tensors.begin(), tensors.end(), covers_clip);
}

// Summed in double within a chunk and over the chunks in their order: the same for any number of threads.
Tensor total_norm_cpu(at::TensorList tensors, double norm_type) {
  const bool largest = norm_type == std::numeric_limits<double>::infinity();
  TORCH_CHECK_NOT_IMPLEMENTED(largest || norm_type == 2, "nnfast::total_norm: norm_type 2 or infinity");
  check_covered(covers_all(tensors), "total_norm");
  Tensor out = at::empty({}, at::kDouble);
  normed.taken();
  int64_t chunks = 0;
  for (const auto& t : tensors) chunks += at::ceil_div(t.numel(), int64_t{step_chunk});
  std::vector<double> parts(chunks);
  const auto* kernels = cpu_kernels();
  for_each_chunk(tensors, [&](size_t i, int64_t begin, int64_t end, int64_t chunk) {
    const auto part = largest ? kernels->largest : kernels->sum_of_squares;
    parts[chunk] = part(cpu_dtype(tensors[i]), tensors[i].const_data_ptr(), begin, end);
  });
  double total = 0;
  for (const double part : parts) total = !largest ? total + part : part > total || part != part ? part : total;
  *out.mutable_data_ptr<double>() = largest ? total : std::sqrt(total);
  return out;
}

void scale_cpu(at::TensorList tensors, double factor) {
  check_covered(covers_all(tensors), "scale_");
  scaled.taken();
  const auto scale = [&](at::TensorList some) {
    for_each_chunk(some, [&](size_t i, int64_t begin, int64_t end, int64_t) {
      cpu_kernels()->scale(cpu_dtype(some[i]), some[i].mutable_data_ptr(), factor, begin, end);
    });
  };
  if (!overlap(tensors)) return scale(tensors);
  in_order.taken();
  for (size_t i = 0; i < tensors.size(); ++i) scale(tensors.slice(i, 1));
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CPU, m) {
  m.impl("total_norm", total_norm_cpu);
  m.impl("scale_", scale_cpu);
}

}  // namespace nnfast
