// One step of RMSprop for any number of tensors in one launch. The maths is in math/rmsprop.h.
//
// Bound by memory: read p, g, v and write p, v, which is 20 bytes an element in float; 8 more with momentum, and 8 more
// where the gradient is centered.
#include "optimizer.cuh"

namespace nnfast::cuda {
namespace {

constexpr int kResident = 3;  // blocks a multiprocessor holds at the least; a measurement should settle it

struct Formula {
  using Numbers = RMSprop;
  template <class A>
  using Scalars = RMSpropStep<A>;
  static constexpr int kState = 3, kLate = 3;  // square_avg, momentum_buffer, grad_avg

  static __device__ RMSpropStep<double> at(const RMSprop& n, double lr, double) {
    auto s = n.known;
    s.lr = lr;
    return s;
  }
  // g becomes the update.
  static __device__ void moments(float p, float& g, float (&s)[3], unsigned kept, const RMSpropStep<float>& c) {
    if (c.l2 != 0) g += p * c.l2;
    float variance = s[0] = rmsprop_square_avg(g, s[0], c);
    if (kept & 4) {
      s[2] = rmsprop_grad_avg(g, s[2], c);
      variance -= s[2] * s[2];
    }
    g = rmsprop_update(g, variance, c);
    if (kept & 2) g = s[1] = s[1] * c.momentum + g;
  }
  static __device__ void param(float& p, float g, float (&)[3], unsigned, const RMSpropStep<float>& c) {
    p -= c.lr * g;
  }
};

__global__ void __launch_bounds__(kStepThreads, kResident) rmsprop_kernel(const __grid_constant__ Step<RMSprop> a) {
  step<Formula>(a);
}

}  // namespace

cudaError_t rmsprop(const Step<RMSprop>& a, cudaStream_t stream) {
  return launch(rmsprop_kernel, dim3(a.table.chunk_count), kStepThreads, 0, stream, a);
}

}  // namespace nnfast::cuda
