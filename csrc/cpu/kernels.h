// What the CPU kernels offer to the rest of the extension: plain functions over plain pointers, one table an
// instruction set. No torch header is needed here: they cost seconds a file.
#pragma once

#include <cstdint>

#include "../math/adamw.h"

namespace nnfast {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
enum class DType { f32, f64, bf16, f16 };

// Rows of `size` elements. mean and rstd are float (double for f64), one a row.
struct LayerNormForward {
  DType dtype, weight_dtype;
  int64_t size;
  int64_t input_stride;  // elements from row to row; output rows are contiguous
  double eps;
  const void *input, *weight, *bias;  // weight and bias may be null
  void *output, *mean, *rstd;
  bool stream;  // write the output past the caches
};
struct LayerNormBackward {
  DType dtype, weight_dtype;
  int64_t size;
  int64_t grad_out_stride, input_stride;
  const void *grad_out, *input, *weight, *mean, *rstd;
  void* grad_input;  // may be null
  bool stream;
};

// Elementwise over contiguous elements.
struct Gelu {
  DType dtype;
  bool tanh;
  const void* input;
  void *output, *copy;  // copy may be null: else the input is written there as well
  bool stream;
};
// grad_pre = grad_out * gelu'(pre), over contiguous rows of `size` elements.
struct GeluBackward {
  DType dtype;
  bool tanh;
  int64_t size;
  const void *grad_out, *pre;
  void* grad_pre;
  bool stream;
};

// Rows of `size` logits and each row's class. What a kernel keeps and takes beside the logits, weight included, is of
// the accumulation type: max and sum, one a row.
struct CrossEntropyForward {
  DType dtype;
  int64_t size, input_stride;
  double smoothing;
  int64_t ignore_index;
  const void* input;
  const int64_t* target;
  const void* weight;  // may be null
  void *max, *sum, *loss;
};
struct CrossEntropyBackward {
  DType dtype;
  int64_t size, input_stride;
  int64_t grad_stride;  // 1, or 0 for one gradient of all rows
  double smoothing;
  int64_t ignore_index;
  double all_weights;   // their sum over the classes
  double total_weight;  // what each row's gradient is divided by
  const void* input;
  const int64_t* target;
  const void *weight, *max, *sum, *grad;  // weight may be null
  void* grad_input;                       // contiguous rows, or where the input is
  bool stream;
};

struct AdamWTensor {
  DType dtype;
  void *param, *grad, *exp_avg, *exp_avg_sq, *max_exp_avg_sq;  // the last one null without amsgrad
  bool maximize;
  double grad_scale;  // where it is not 1, the gradient is divided by it, and written back so
  AdamWStep<double> step;
};

// Row kernels take [begin, end) of the rows, elementwise ones of the elements. `grad_weight`, `grad_bias` are
// sums of the accumulation type over those rows, added to what is there; either may be null.
struct Kernels {
  const char* name;
  bool avx512;
  void (*layer_norm)(const LayerNormForward&, int64_t begin, int64_t end);
  void (*layer_norm_backward)(const LayerNormBackward&, void* grad_weight, void* grad_bias, int64_t begin, int64_t end);
  void (*gelu)(const Gelu&, int64_t begin, int64_t end);
  void (*gelu_backward)(const GeluBackward&, void* grad_bias, int64_t begin, int64_t end);
  void (*cross_entropy)(const CrossEntropyForward&, int64_t begin, int64_t end);
  void (*cross_entropy_backward)(const CrossEntropyBackward&, int64_t begin, int64_t end);
  // sums[i] += the sum over the rows of rows[r][i]; they lie `stride` elements apart.
  void (*sum_rows)(DType dtype, const void* rows, int64_t stride, int64_t size, void* sums, int64_t begin, int64_t end);
  // to[i] += from[i]; from[i] = 0.
  void (*move_sums)(DType dtype, void* to, void* from, int64_t size);
  // out[i] = the sum of parts[k][i] over k < count, in that order; parts lie `size` apart, in the accumulation type.
  void (*sum_parts)(DType out_dtype, const void* parts, int64_t count, int64_t size, void* out);
  void (*adamw)(const AdamWTensor&, int64_t begin, int64_t end);
};

namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}

}  // namespace nnfast
