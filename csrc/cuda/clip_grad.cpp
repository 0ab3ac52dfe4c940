// The norm of many tensors on a CUDA device, and their scaling.
#include <torch/library.h>

#include "optimizer.h"

namespace nnfast::cuda {
namespace {

StepTable table_of(at::TensorList tensors, const On& on, const char* op) {
  bool covered = true;
  std::vector<StepTensor> all(tensors.size());
  for (size_t i = 0; i < all.size(); ++i) {
    const Tensor& t = tensors[i];
    covered = covered && covers_clip(t) && t.device() == tensors[0].device();
    check_covered(covered, op);
    all[i].grad = t.mutable_data_ptr();
    all[i].grad_dtype = dtype_of(t);
    all[i].aligned = on_16_bytes(all[i].grad);
    set_size(all[i], t.numel());
  }
  return with_table(std::move(all), on.stream);
}

Tensor total_norm_cuda(at::TensorList tensors, double norm_type) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tensors.empty() && norm_type == 2, "nnfast::total_norm on a GPU: norm_type 2");
  const On on(tensors[0]);
  Norm a{};
  a.table = table_of(tensors, on, "total_norm");
  const Tensor parts = at::empty({a.table.chunk_count}, tensors[0].options().dtype(at::kFloat)),
               norm = at::empty({}, tensors[0].options().dtype(at::kDouble));
  a.parts = parts.mutable_data_ptr<float>();
  a.norm = norm.mutable_data_ptr<double>();
  C10_CUDA_CHECK(cuda::norm(a, on.stream));
  return norm;
}

std::tuple<Tensor, Tensor> clip_coef_cuda(at::TensorList tensors, double max_norm, const OptTensor& grad_scale) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tensors.empty(), "nnfast::clip_coef wants a tensor");
  const On on(tensors[0]);
  Norm a{};
  a.table = table_of(tensors, on, "clip_coef");
  const auto options = tensors[0].options();
  const Tensor parts = at::empty({a.table.chunk_count}, options.dtype(at::kFloat)),
               norm = at::empty({}, options.dtype(norm_dtype(tensors))),
               coef = at::empty({}, options.dtype(at::kFloat));
  a.parts = parts.mutable_data_ptr<float>();
  a.max_norm = max_norm;
  a.grad_scale = device_float(grad_scale, tensors[0], "clip_coef", "grad_scale");
  a.coef = coef.mutable_data_ptr<float>();
  a.rounded = norm.mutable_data_ptr();
  a.rounded_dtype = dtype_of(norm);
  C10_CUDA_CHECK(cuda::norm(a, on.stream));
  return {norm, coef};
}

void scale_by_cuda(at::TensorList tensors, const Tensor& factor) {
  if (tensors.empty()) return;
  const On on(tensors[0]);
  const StepTable table = table_of(tensors, on, "scale_by_");
  C10_CUDA_CHECK(cuda::scale(table, device_float(factor, tensors[0], "scale_by_", "factor"), on.stream));
}

}  // namespace

TORCH_LIBRARY_IMPL(nnfast, CUDA, m) {
  m.impl("total_norm", total_norm_cuda);
  m.impl("clip_coef", clip_coef_cuda);
  m.impl("scale_by_", scale_by_cuda);
}

}  // namespace nnfast::cuda
