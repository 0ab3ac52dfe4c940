// What the CPU kernels offer to the rest of the extension: plain functions over plain pointers, one table an
// instruction set. No torch header is needed here: they cost seconds a file.
#pragma once

#include <cstdint>

#include "../math/adamw.h"
#include "../math/rmsprop.h"
#include "../math/sgd.h"

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
  bool* changed;  // becomes true where the exponentials of a row no longer add up to its sum; any thread writes it
};

// One tensor of an optimizer's step; Scalars are the numbers of its formula (csrc/math), formed in double.
struct StepTensor {
  DType dtype, state_dtype;  // the latter float or as dtype
  void *param, *grad;
  void* state[3];   // in the order of the op's arguments; null where the optimizer keeps none
  int16_t* master;  // the low 16 bits of a bf16 parameter's float value, or null
  bool maximize;
  double grad_scale;  // where it is not 1, the gradient is divided by it, and written back so
  double clip_coef;   // where it is not 1, what is then used is multiplied by it
  bool stochastic;    // whether a bf16 parameter and state are rounded up or down by chance,
  uint32_t seed;      // drawn from this
};
template <class Scalars>
struct StepOf : StepTensor {
  Scalars scalars;
};
using AdamWTensor = StepOf<AdamWStep<double>>;
using SgdTensor = StepOf<SgdStep<double>>;
using RMSpropTensor = StepOf<RMSpropStep<double>>;

// Scaled dot product attention of (batch, heads, length, size), the last dimension contiguous.
struct Attention {
  static constexpr int64_t kBlock = 64;  // queries, and keys, at a time
  struct Tensor {
    void* p;
    int64_t strides[3];  // of batch, head and row
  };
  enum class Mask { none, boolean, f32, bf16, f16 };
  // What a task, which any thread may take, computes: the output of a block of queries; the gradients of a head of keys
  // and values and of all queries that read it; those of a block of queries; those of a block of keys and values. Tasks
  // count blocks within heads within the batch.
  enum class Part { forward, backward_head, backward_queries, backward_keys };

  DType dtype;
  int64_t batch, heads, kv_heads, queries, keys, size, value_size;
  bool causal;
  double scale;
  Tensor query, key, value, output;
  Mask mask_type;
  const void* mask;
  int64_t mask_strides[4];
  // (2, batch, heads, queries): the largest score before any scale that waits (see scaled_first), and 1 / the sum of
  // the exponentials; infinity and 0 where no key is seen.
  float* stats;
  Tensor grad_out, grad_query, grad_key, grad_value;  // any of the last three may be null

  int64_t query_blocks() const { return (queries + kBlock - 1) / kBlock; }
  int64_t key_blocks() const { return (keys + kBlock - 1) / kBlock; }
  // Scores are multiplied by the scale at once, and not within the exponential, where a mask is added to them, or where
  // the scale does not keep their order.
  bool scaled_first() const { return mask_type != Mask::none || !(scale > 1e-30 && scale < 1e30); }
};

// c = a b^T + bias for matrices (m, k) and (n, k) of 16 bits, of which each lies by rows or by columns: one stride
// is 1. Summed in float; c lies by rows, and is float or of the dtype of a and b. The caller goes over blocks of k, one
// after another, and for each lays the columns of b out and then adds the products of its rows to the sums.
struct Gemm {
  static constexpr int64_t kDepth = 256;  // of a block of k
  struct Matrix {
    const void* p;
    int64_t strides[2];  // in elements
  };
  DType dtype, out_dtype;
  int64_t m, n, k;
  Matrix a, b;
  const void* bias;  // n of dtype, or null
  void* c;
};
// Rows and columns of c, and a block of k.
struct GemmPart {
  int64_t row, rows, column, columns, k0, depth;
};

// Row kernels process rows [begin, end), elementwise kernels elements [begin, end). `grad_weight` and `grad_bias` are
// arrays of sums in the accumulation type, to which the kernel adds its rows; either may be null.
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
  void (*sgd)(const SgdTensor&, int64_t begin, int64_t end);
  void (*rmsprop)(const RMSpropTensor&, int64_t begin, int64_t end);
  // The sum of the squares of [begin, end), in double; or the largest absolute value, NaN where there is one.
  double (*sum_of_squares)(DType dtype, const void* x, int64_t begin, int64_t end);
  double (*largest)(DType dtype, const void* x, int64_t begin, int64_t end);
  void (*scale)(DType dtype, void* x, double factor, int64_t begin, int64_t end);
  // How many rows of a, and columns of b, are laid out side by side: a block of them is padded to a multiple of it.
  int64_t gemm_rows, gemm_columns;
  void (*gemm_pack)(const Gemm&, const GemmPart&, float* b);
  // Adds to the sums, `stride` floats a row, or sets them where k0 is 0, and writes c after the last block of k. `a`:
  // room for rows x depth floats, and 16 more.
  void (*gemm)(const Gemm&, const GemmPart&, const float* b, float* sums, int64_t stride, float* a);
  void (*attention)(const Attention&, Attention::Part, int64_t task, void* scratch);
  // Bytes of scratch memory, aligned to 64.
  int64_t (*attention_scratch)(const Attention&, Attention::Part);
};

// What the library of the kernels offers to the other libraries.
#pragma GCC visibility push(default)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
#pragma GCC visibility pop

}  // namespace nnfast
