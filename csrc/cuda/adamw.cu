// One step of Adam or AdamW for any number of tensors in one launch. The maths is in math/adamw.h.
//
// Bound by memory: read p, g, m, v and write p, m, v, which is 28 bytes an element in float.
#include "optimizer.cuh"

namespace nnfast::cuda {
namespace {

constexpr int kResident = 3;  // blocks a multiprocessor holds at the least; a measurement should settle it

struct Formula {
  using Numbers = AdamW;
  template <class A>
  using Scalars = AdamWStep<A>;
  static constexpr int kState = 3, kLate = 2;  // exp_avg, exp_avg_sq, and max_exp_avg_sq under amsgrad

  static __device__ AdamWStep<double> at(const AdamW& n, double lr, double count) {
    return AdamWStep<double>(
        lr, n.beta1, n.beta2, n.eps, n.weight_decay, exp(count * n.log_beta1), exp(count * n.log_beta2), n.decoupled);
  }
  static __device__ void moments(float p, float& g, float (&s)[3], unsigned, const AdamWStep<float>& c) {
    if (c.l2 != 0) g += p * c.l2;
    adamw_moments(g, s[0], s[1], c);
  }
  static __device__ void param(float& p, float, float (&s)[3], unsigned kept, const AdamWStep<float>& c) {
    float v = s[1];
    if (kept & 4) v = s[2] = v > s[2] || v != v ? v : s[2];  // a NaN stays
    p = adamw_param(p, s[0], v, c);
  }
};

__global__ void __launch_bounds__(kStepThreads, kResident) adamw_kernel(const __grid_constant__ Step<AdamW> a) {
  step<Formula>(a);
}

}  // namespace

cudaError_t adamw(const Step<AdamW>& a, cudaStream_t stream) {
  return launch(adamw_kernel, dim3(a.table.chunk_count), kStepThreads, 0, stream, a);
}

}  // namespace nnfast::cuda
