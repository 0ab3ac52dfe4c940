// What the contract of every op shares: how it is called through the dispatcher, and which calls are covered.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <tuple>

namespace nnfast {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// The op as the dispatcher knows it. Look it up once: `static const auto op =
// find_op<decltype(layer_norm)>("layer_norm");`
template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("nnfast::") + name).c_str(), "")
      .typed<Signature>();
}

// What the op gives, below autograd.
template <class F, class... T>
auto below_autograd(F* op, const T&... args) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op(args...);
}

inline bool defined(const OptTensor& t) { return t.has_value() && t->defined(); }

inline bool needs_grad(const Tensor& t) { return t.defined() && t.requires_grad(); }
inline bool needs_grad(const OptTensor& t) { return t.has_value() && needs_grad(*t); }
template <class... T>
bool any_needs_grad(const T&... t) {
  return at::GradMode::is_enabled() && (needs_grad(t) || ...);
}

// Whether forward-mode AD differentiates t as well: torch's own formulas, in ATen, hand its tangent on.
inline bool has_tangent(const Tensor& t) { return t.defined() && t._fw_grad(0).defined(); }

// t in autocast's dtype, as autocast's own ops bring it there.
Tensor autocast_to_lower(const Tensor& t, c10::DeviceType device);
OptTensor autocast_to_lower(const OptTensor& t, c10::DeviceType device);

inline bool known_dtype(at::ScalarType t) {
  return t == at::kFloat || t == at::kDouble || t == at::kBFloat16 || t == at::kHalf;
}
inline bool half_dtype(at::ScalarType t) { return t == at::kBFloat16 || t == at::kHalf; }
inline bool float_or_half(at::ScalarType t) { return t == at::kFloat || half_dtype(t); }

// Anyone may call an op. What nnfast's own functions do not hand to it, it refuses.
inline void check_covered(bool covered, const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      covered, "nnfast::", op, " does not cover this call; nnfast's functions hand it to torch");
}

// ---- which calls are covered ----
//
// A call is ours when nothing but plain eager execution is going on (ordinary_thread), every tensor is a plain
// strided one (ordinary), and the op's own covers_...() knows the dtypes and shapes. All of it is read off the
// inputs of this call, so that a forward and its recomputation under checkpointing decide alike.

// No functorch transform, no dispatch mode, no tracing. ordinary_thread() is of the gate, for it asks Python.
bool plain_thread();

// Strided, dense, on a CPU or a GPU.
bool ordinary(const Tensor& t);
inline bool ordinary(const OptTensor& t) { return !defined(t) || ordinary(*t); }

// Whether the CUDA kernels hold machine code, or PTX, that a GPU runs; set where they are built in.
extern bool (*cuda_kernels_load)(c10::DeviceIndex device);

// dtype: of the output, where it is not the input's.
bool covers_layer_norm(
    const Tensor& input, at::IntArrayRef normalized_shape, const OptTensor& weight, const OptTensor& bias,
    std::optional<at::ScalarType> dtype = std::nullopt);
// The number of rows and their size. torch's own error where the shapes are wrong, and one of ours where the call is
// not covered or there are no kernels.
std::pair<int64_t, int64_t> check_layer_norm(
    const Tensor& input, at::IntArrayRef normalized_shape, const OptTensor& weight, const OptTensor& bias,
    std::optional<at::ScalarType> dtype, bool kernels = true);
// float, where that is the output's dtype, or its gradient's, beside an input of 16 bits.
std::optional<at::ScalarType> float_beside(const Tensor& input, const Tensor& output);
// Anyone may call the backward op, so grad_out and stats are checked: an error of torch's kind where they do not fit
// the input.
void check_layer_norm_backward(
    const Tensor& grad_out, const Tensor& input, c10::SymIntArrayRef normalized_shape, const Tensor& stats);
bool covers_gelu(const Tensor& input, c10::string_view approximate);
// torch's kind of error where grad_output is not what gelu(self) gives.
void check_gelu_backward(const Tensor& grad_output, const Tensor& self);
void check_gelu_linear_backward(const Tensor& grad_output, const Tensor& weight, const Tensor& self);
bool covers_linear(const Tensor& input, const Tensor& weight, const OptTensor& bias);
// Whether the weight lies by columns, and its gradient shall.
bool by_columns(const OptTensor& weight);
// torch's kind of error where what the op would read does not fit together.
void check_linear_backward(
    const Tensor& grad_out, const OptTensor& input, const OptTensor& weight, std::array<bool, 3> output_mask,
    std::optional<at::ScalarType> dtype, std::optional<at::ScalarType> input_dtype);
bool covers_linear_gelu(const Tensor& input, const Tensor& weight, const OptTensor& bias, c10::string_view approximate);
// The dimension of the classes.
inline int64_t class_dim(const Tensor& input) { return input.dim() == 1 ? 0 : 1; }
bool covers_cross_entropy(
    const Tensor& input, const Tensor& target, const OptTensor& weight, int64_t ignore_index, double label_smoothing,
    std::optional<at::ScalarType> dtype = std::nullopt);
bool covers_linear_cross_entropy(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target, const OptTensor& linear_bias,
    const OptTensor& weight, int64_t ignore_index, double label_smoothing,
    std::optional<at::ScalarType> dtype = std::nullopt);
// torch's error for a class that is none.
void check_classes(const Tensor& target, int64_t classes, int64_t ignore_index);
// What a mean divides by: the weights of the rows' classes, ignored ones left out. None where a class is out of range.
std::optional<double> total_weight(
    const Tensor& target, const OptTensor& weight, int64_t classes, int64_t ignore_index);

bool covers_embedding(const Tensor& weight, const Tensor& indices, int64_t padding_idx);
bool covers_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptTensor& attn_mask, bool is_causal);
// Whether the user has left on the kernels by which torch would have served this call.
bool allowed_attention(const Tensor& query, const Tensor& key, const Tensor& value, const OptTensor& attn_mask);
// The strides of the output, where it is not contiguous: torch's fused kernel gives it the query's.
std::optional<std::vector<int64_t>> attention_strides(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptTensor& attn_mask);
void check_attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& value, const Tensor& output, const Tensor& stats);

// ---- the ops; their schemas and what they do are in the file of their stem; the optimizers' in optimizer.h ----

std::tuple<Tensor, Tensor> layer_norm(
    const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptTensor& weight, const OptTensor& bias,
    double eps, std::optional<at::ScalarType> dtype = std::nullopt);
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& grad_out, const Tensor& input, c10::SymIntArrayRef normalized_shape, const Tensor& stats,
    const OptTensor& weight, const OptTensor& bias, std::array<bool, 3> output_mask);
Tensor gelu(const Tensor& self, c10::string_view approximate);
Tensor gelu_backward(const Tensor& grad_output, const Tensor& self, c10::string_view approximate);
Tensor linear(const Tensor& input, const Tensor& weight, const OptTensor& bias);
std::tuple<Tensor, Tensor, Tensor> linear_backward(
    const Tensor& grad_out, const OptTensor& input, const OptTensor& weight, std::array<bool, 3> output_mask,
    std::optional<at::ScalarType> dtype = std::nullopt, std::optional<at::ScalarType> input_dtype = std::nullopt);
std::tuple<Tensor, Tensor> gelu_backward_sum(
    const Tensor& grad_output, const Tensor& self, c10::string_view approximate);
std::tuple<Tensor, Tensor, Tensor> gelu_linear_backward(
    const Tensor& grad_output, const Tensor& weight, const Tensor& self, c10::string_view approximate);
// Whether gelu_linear_backward has a kernel for the device of t.
bool has_gelu_linear_backward(const Tensor& t);
std::tuple<Tensor, Tensor> linear_gelu(
    const Tensor& input, const Tensor& weight, const OptTensor& bias, c10::string_view approximate,
    bool want_pre = true);
std::tuple<Tensor, Tensor> cross_entropy(
    const Tensor& input, const Tensor& target, const OptTensor& weight, int64_t reduction, int64_t ignore_index,
    double label_smoothing, std::optional<at::ScalarType> dtype = std::nullopt);
Tensor cross_entropy_backward(
    const Tensor& grad_out, const Tensor& input, const Tensor& stats, const Tensor& target, const OptTensor& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing, bool check_input = false);
void cross_entropy_backward_(
    const Tensor& grad_out, const Tensor& input, const Tensor& stats, const Tensor& target, const OptTensor& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing, bool check_input = false);
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target, const OptTensor& linear_bias,
    const OptTensor& weight, int64_t reduction, int64_t ignore_index, double label_smoothing,
    std::optional<at::ScalarType> dtype = std::nullopt, std::array<bool, 3> output_mask = {});
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(
    const Tensor& grad_out, const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const OptTensor& linear_bias, const OptTensor& weight, int64_t reduction, int64_t ignore_index,
    double label_smoothing, std::array<bool, 3> output_mask);
Tensor embedding(const Tensor& weight, const Tensor& indices, c10::SymInt padding_idx, bool scale_grad_by_freq);
std::tuple<Tensor, Tensor> scaled_dot_product_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptTensor& attn_mask, bool is_causal,
    std::optional<double> scale);
std::tuple<Tensor, Tensor, Tensor> scaled_dot_product_attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const OptTensor& attn_mask,
    const Tensor& output, const Tensor& stats, bool is_causal, std::optional<double> scale,
    std::array<bool, 3> output_mask);

}  // namespace nnfast
