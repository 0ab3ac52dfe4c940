// What the CUDA kernels offer to the rest of the extension: plain functions over plain pointers and a stream. No torch
// header is needed here: they cost half a minute a file.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../math/adamw.h"
#include "../math/rmsprop.h"
#include "../math/sgd.h"

// The library offers these, and nothing else that it defines.
#pragma GCC visibility push(default)

namespace nnfast::cuda {

enum class DType : uint8_t { f32, bf16, f16 };  // float64 is torch's

// Whether the current device runs what the kernels were compiled for: all of them for the same architectures.
bool kernels_load();

// Rows of `size` elements. Output rows are contiguous. dtype: of input and grad_input; output_dtype: of all the rest,
// the same or float beside 16 bits.
struct LayerNormForward {
  DType dtype, output_dtype;
  int64_t rows, size, input_stride;
  double eps;
  const void *input, *weight, *bias;  // weight and bias may be null
  void* output;
  float *mean, *rstd;  // one a row
};
struct LayerNormBackward {
  DType dtype, output_dtype;
  int64_t rows, size, grad_out_stride, input_stride;
  const void *grad_out, *input, *weight;
  const float *mean, *rstd;
  void *grad_input, *grad_weight, *grad_bias;  // any may be null
};
cudaError_t layer_norm(const LayerNormForward& f, cudaStream_t stream);
// `parts` holds 2 x layer_norm_parts(b) x size numbers: sums over rows, on their way to grad_weight and grad_bias.
int64_t layer_norm_parts(const LayerNormBackward& b);
cudaError_t layer_norm_backward(const LayerNormBackward& b, float* parts, cudaStream_t stream);

// output = gelu(input), over contiguous elements.
cudaError_t gelu(DType dtype, bool tanh, int64_t count, const void* input, void* output, cudaStream_t stream);

// grad_pre = grad_out gelu'(pre), over contiguous rows of `size` elements, and its sum over the rows.
struct GeluBackward {
  DType dtype;
  bool tanh;
  int64_t rows, size;
  const void *grad_out, *pre;
  void *grad_pre, *grad_bias;  // grad_bias may be null; so may then `parts`
};
int64_t gelu_parts(const GeluBackward& b);  // `parts` holds that many x size numbers
cudaError_t gelu_backward(const GeluBackward& b, float* parts, cudaStream_t stream);

// pre = input weight^T + bias rounded to its type, output = gelu(pre), in one kernel for sm_90a: bf16 or f16, every
// pointer on 16 bytes, out and in multiples of 8.
struct LinearGelu {
  DType dtype;
  bool tanh;
  int64_t rows, in, out;
  const void *input, *weight, *bias;  // (rows, in), (out, in), (out) or null
  void *output, *pre;                 // (rows, out); pre may be null
  int64_t cooperative_in;             // from this `in` on both warpgroups share the largest tile
  int device;
};
int64_t linear_gelu_workspace(const LinearGelu& f);  // bytes
// CUTLASS's error, or null.
const char* linear_gelu(const LinearGelu& f, void* workspace, cudaStream_t stream);

// The backward of linear(gelu(pre), weight), in one kernel for sm_90a as above: grad = grad_out weight, grad_pre = grad
// gelu'(pre), and the sum of grad_pre over the rows.
struct GeluLinearBackward {
  DType dtype;
  bool tanh, by_columns;                // the weight lies as (in, out)
  int64_t rows, in, out;                // in: of the Linear, the GELU's
  const void *grad_out, *weight, *pre;  // (rows, out), (out, in), (rows, in)
  void *grad, *grad_pre, *grad_bias;    // (rows, in) twice, (in)
  int device;
};
// `parts` holds so many rows of `width` numbers, and grad_bias one such row.
int64_t gelu_linear_parts(const GeluLinearBackward& b), gelu_linear_width(const GeluLinearBackward& b);
int64_t gelu_linear_workspace(const GeluLinearBackward& b);  // bytes
const char* gelu_linear_backward(const GeluLinearBackward& b, float* parts, void* workspace, cudaStream_t stream);

// ---- optimizers: one launch for all tensors of a group ----

// One tensor of a step, in a table that lies on the device.
struct StepTensor {
  void *param, *grad, *state[3];  // state: null where the optimizer keeps none of it
  float* step;                    // the count on the device, which the kernel advances; or null:
  double step_offset;             // then the count is the launch's step plus this
  int64_t size;
  uint32_t chunks;  // of the tensor, at least 1
  uint32_t done;    // chunks of this launch that have been here; 0 between launches
  DType param_dtype, grad_dtype, state_dtype;
  bool aligned;  // every pointer on 16 bytes
};
constexpr int64_t kStepChunk = 8192;  // elements a block updates; a measurement should settle it
struct StepChunk {
  uint32_t tensor, index;
};
struct StepTable {
  StepTensor* tensors;  // both on the device
  const StepChunk* chunks;
  int64_t chunk_count;
};
// Numbers: the optimizer's. `known` in them is what an element needs, for a tensor at `step` with the lr of the host.
template <class Numbers>
struct Step {
  StepTable table;
  double lr, step;
  const void* device_lr;  // null, or one number there in place of lr
  bool device_lr_is_double, maximize;
  const float *grad_scale, *found_inf, *clip_coef;  // null, or one number on the device
  Numbers numbers;
};
struct AdamW {
  double beta1, beta2, weight_decay, eps, log_beta1, log_beta2;
  bool decoupled;
  AdamWStep<double> known;
};
struct Sgd {
  SgdStep<double> known;
};
struct RMSprop {
  RMSpropStep<double> known;
};
cudaError_t adamw(const Step<AdamW>& a, cudaStream_t stream);
cudaError_t sgd(const Step<Sgd>& a, cudaStream_t stream);
cudaError_t rmsprop(const Step<RMSprop>& a, cudaStream_t stream);

// The norm of the `grad`s of a table, divided by grad_scale where that is given.
struct Norm {
  StepTable table;
  float* parts;  // chunk_count numbers, on their way
  double max_norm;
  const float* grad_scale;  // null, or one number on the device
  double* norm;             // or null
  float* coef;              // or null: what the gradients are to be multiplied by, at most 1
  void* rounded;            // beside coef: the norm, rounded to rounded_dtype
  DType rounded_dtype;
};
cudaError_t norm(const Norm& a, cudaStream_t stream);
// The `grad`s of a table times one number on the device.
cudaError_t scale(const StepTable& a, const float* factor, cudaStream_t stream);

}  // namespace nnfast::cuda

#pragma GCC visibility pop
