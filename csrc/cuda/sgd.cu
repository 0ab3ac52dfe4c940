// One step of SGD for any number of tensors in one launch. The maths is in math/sgd.h.
//
// Bound by memory: read p, g, b and write p, b, which is 20 bytes an element in float; 12 without momentum.
#include "optimizer.cuh"

namespace nnfast::cuda {
namespace {

constexpr int kResident = 4;  // blocks a multiprocessor holds at the least; a measurement should settle it

struct Formula {
  using Numbers = Sgd;
  template <class A>
  using Scalars = SgdStep<A>;
  static constexpr int kState = 1, kLate = 1;  // momentum_buffer

  static __device__ SgdStep<double> at(const Sgd& n, double lr, double) {
    auto s = n.known;
    s.lr = lr;
    return s;
  }
  static __device__ void moments(float p, float& g, float (&s)[1], unsigned kept, const SgdStep<float>& c) {
    if (c.l2 != 0) g += p * c.l2;
    if (kept) g = sgd_momentum(g, s[0], c);
  }
  static __device__ void param(float& p, float g, float (&)[1], unsigned, const SgdStep<float>& c) {
    p = sgd_param(p, g, c);
  }
};

__global__ void __launch_bounds__(kStepThreads, kResident) sgd_kernel(const __grid_constant__ Step<Sgd> a) {
  step<Formula>(a);
}

}  // namespace

cudaError_t sgd(const Step<Sgd>& a, cudaStream_t stream) {
  return launch(sgd_kernel, dim3(a.table.chunk_count), kStepThreads, 0, stream, a);
}

}  // namespace nnfast::cuda
