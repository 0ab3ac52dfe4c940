// What the CUDA implementations of the ops share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels.h"

namespace nnfast::cuda {

inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default: TORCH_CHECK_NOT_IMPLEMENTED(false, "nnfast has no CUDA kernel for ", t.scalar_type());
  }
}

// Where the kernels of a call run: the current stream of the device of `t`, which is the current device meanwhile.
struct On {
  explicit On(const at::Tensor& t) : guard(t.device()), stream(c10::cuda::getCurrentCUDAStream(t.device().index())) {}
  c10::cuda::CUDAGuard guard;
  c10::cuda::CUDAStream stream;
};

}  // namespace nnfast::cuda
