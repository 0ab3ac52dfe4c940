// The norm of many tensors in one launch, and their scaling in one more. A step that clips needs the first alone: it
// reads the factor as it reads the gradients.
//
// Bound by memory: 4 bytes an element in float for the norm; 8 for the scaling, and none where nothing is clipped.
#include "optimizer.cuh"

namespace nnfast::cuda {
namespace {

// Each block adds up its chunk in float: some thirty squares a thread, then sums in pairs, which loses few digits. The
// last block to be done adds up all blocks' sums in double, in their order: the same from run to run.
__global__ void __launch_bounds__(kStepThreads) norm_kernel(const __grid_constant__ Norm a) {
  const StepChunk which = a.table.chunks[blockIdx.x];
  const StepTensor& t = a.table.tensors[which.tensor];
  const Chunk chunk(t, which);
  float s[1] = {};
  const auto add = [&](auto elements) {
    each_of_chunk<decltype(elements)::V>(t.aligned, chunk.begin, chunk.end, [&](int64_t i, auto size) {
      float x[size()];
      elements.load(i, x);
#pragma unroll
      for (int j = 0; j < size(); ++j) s[0] += x[j] * x[j];
    });
  };
  Any(t.grad, t.grad_dtype).visit(add);
  sum_over_threads<kStepThreads>(s);

  __shared__ bool last;
  if (threadIdx.x == 0) {
    a.parts[blockIdx.x] = s[0];
    __threadfence();  // the sum is there before this block says so
    unsigned& done = a.table.tensors[0].done;
    last = atomicInc(&done, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();  // and is read after the last one has said so
  }
  __syncthreads();
  if (!last) return;
  __shared__ double sums[kStepThreads];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < gridDim.x; i += kStepThreads)
    sum += *reinterpret_cast<const volatile float*>(a.parts + i);
  sums[threadIdx.x] = sum;
  for (int half = kStepThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x != 0) return;
  double norm = sqrt(sums[0]);
  if (a.grad_scale) norm /= *a.grad_scale;
  if (a.norm) *a.norm = norm;
  if (!a.coef) return;
  if (a.rounded_dtype == DType::f32)
    *static_cast<float*>(a.rounded) = norm;
  else if (a.rounded_dtype == DType::bf16)
    *static_cast<bf16*>(a.rounded) = bf16(float(norm));
  else
    *static_cast<f16*>(a.rounded) = f16(float(norm));
  const double coef = a.max_norm / (norm + 1e-6);
  *a.coef = coef > 1 ? 1 : coef;  // a NaN stays
}

__global__ void __launch_bounds__(kStepThreads) scale_kernel(const __grid_constant__ StepTable a, const float* factor) {
  const float by = *factor;
  if (by == 1) return;
  const StepChunk which = a.chunks[blockIdx.x];
  const StepTensor& t = a.tensors[which.tensor];
  const Chunk chunk(t, which);
  Any(t.grad, t.grad_dtype).visit([&](auto elements) {
    each_of_chunk<decltype(elements)::V>(t.aligned, chunk.begin, chunk.end, [&](int64_t i, auto size) {
      float x[size()];
      elements.load(i, x);
#pragma unroll
      for (auto& v : x) v *= by;
      elements.store(i, x);
    });
  });
}

}  // namespace

cudaError_t norm(const Norm& a, cudaStream_t stream) {
  return launch(norm_kernel, dim3(a.table.chunk_count), kStepThreads, 0, stream, a);
}
cudaError_t scale(const StepTable& a, const float* factor, cudaStream_t stream) {
  return launch(scale_kernel, dim3(a.chunk_count), kStepThreads, 0, stream, a, factor);
}

}  // namespace nnfast::cuda
