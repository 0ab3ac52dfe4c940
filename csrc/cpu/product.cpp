#include "product.h"

#include <ATen/Context.h>
#include <ATen/core/List.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>

#include <algorithm>

#include "../ops/paths.h"
#include "cpu.h"
#include "memory.h"

// result = mat1 mat2 by oneDNN, operands by rows or by columns as they are. Libtorch_cpu exports it, though no
// installed header has it: where it is not there, its address is null.
namespace at::native {
__attribute__((weak, visibility("default"))) void mkldnn_matmul(
    const Tensor& mat1, const Tensor& mat2, const Tensor& result, float beta, float alpha);
}

namespace nnfast {
namespace {

Path by_gemm("product.gemm"), by_one_dnn("product.one_dnn"), into_memory("product.into_memory"),
    by_torch("product.torch"), widened("product.widened");

// Whether another library than MKL may make float32 products at all: MKL is made for Intel's CPUs and keeps them there.
bool not_intel() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  return !__builtin_cpu_is("intel");
#else
  return false;
#endif
}
bool avx512() { return cpu_kernels() && cpu_kernels()->avx512; }
bool avx2() { return cpu_kernels() && !cpu_kernels()->avx512; }

// torch multiplies float32 with MKL, and oneDNN is at hand in the same library: 1.1 times as fast on a Zen 4, 1.9
// times on a Zen 5, slower only where the call costs more than the product. With AVX2 alone it is not faster. 16-bit
// products are oneDNN's anyway; but torch writes the bias into each row of the output before them. Called directly,
// oneDNN adds it as it goes: 1.04 to 1.08 times as fast at 1024 rows.
Threshold one_dnn_float32("product.one_dnn_float32", not_intel() && avx512());
Threshold one_dnn_multiply_adds("product.one_dnn_multiply_adds", 2'000'000);

// In 16 bits on a CPU for which oneDNN has no kernels of them, our own (gemm.h) is, from 16 rows on, 2.5 to 12 times as
// fast as torch's forward, 6 to 126 times for the input's gradient and 1.5 to 33 times for the weight's (a Zen 3).
// Measured with AVX2 alone. Tests set 2, so that ours serves whatever oneDNN has.
Threshold gemm_16_bits("product.gemm_16_bits", avx2());
// Below, the call costs more than the product, even where torch's kernel makes only 10^9 multiply-adds a second.
Threshold gemm_multiply_adds("product.gemm_multiply_adds", 8192);

using OneDnnLinear = Tensor(
    const Tensor&, const Tensor&, const OptTensor&, c10::string_view, c10::List<std::optional<at::Scalar>>,
    std::optional<c10::string_view>);

const std::optional<c10::OperatorHandle>& one_dnn() {
  static const auto op = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  return op;
}

// Whether oneDNN has kernels of this type for this CPU.
bool one_dnn_has(at::ScalarType dtype) {
  const auto asked = [](const char* name) {
    const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
    return op && op->typed<bool()>().call();
  };
  static const bool bfloat16 = asked("mkldnn::_is_mkldnn_bf16_supported");
  static const bool float16 = asked("mkldnn::_is_mkldnn_fp16_supported");
  return dtype == at::kHalf ? float16 : bfloat16;
}

int64_t multiply_adds(const Tensor& input, const Tensor& weight) {
  return input.size(0) * input.size(1) * weight.size(0);
}

bool gemm_serves(const Tensor& input, const Tensor& weight) {
  if (!at::isReducedFloatingType(input.scalar_type()) || gemm_16_bits <= one_dnn_has(input.scalar_type())) return false;
  const int64_t work = multiply_adds(input, weight);
  // One or two rows, or columns, are sums of products, which torch makes as fast as it reads what lies by rows.
  const bool few = std::min(input.size(0), weight.size(0)) <= 2;
  return work > 0 && work >= gemm_multiply_adds && !(few && input.stride(1) == 1 && weight.stride(1) == 1);
}

bool one_dnn_serves(const Tensor& input, const Tensor& weight, bool has_bias) {
  const bool is_float = input.scalar_type() == at::kFloat;
  if (!one_dnn() || !(is_float ? one_dnn_float32 : input.scalar_type() == at::kBFloat16 && has_bias && avx512()))
    return false;
  const int64_t work = multiply_adds(input, weight);
  const auto& context = at::globalContext();
  const auto precision = context.float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  // Where the user lets float32 products run in a lower precision, torch decides how.
  const bool exact = !is_float || (precision != at::Float32Precision::BF16 && precision != at::Float32Precision::TF32);
  return work > 0 && work >= one_dnn_multiply_adds && exact && context.userEnabledMkldnn();
}

// How much of a 16-bit product is made before it is widened to float.
Threshold widened_bytes("product.widened_bytes", int64_t(8) << 20);

// a b, where one_dnn_serves, in memory of ours.
Tensor one_dnn_matmul(const Tensor& a, const Tensor& b) {
  into_memory.taken();
  Tensor out = empty({a.size(0), b.size(1)}, a.scalar_type());
  at::native::mkldnn_matmul(a, b, out, 0, 1);
  return out;
}

}  // namespace

Tensor product(const Tensor& input, const Tensor& weight, const OptTensor& bias) {
  // What comes here has the dtype it shall have, also where a backward runs inside autocast.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  if (gemm_serves(input, weight)) {
    by_gemm.taken();
    return gemm(input.scalar_type(), input, weight, bias);
  }
  const bool one_dnn_does = one_dnn_serves(input, weight, defined(bias));
  // mkldnn_matmul refuses a CPU without bfloat16, for float32 too.
  if (one_dnn_does && !defined(bias) && at::native::mkldnn_matmul && one_dnn_has(at::kBFloat16)) {
    by_one_dnn.taken();
    return one_dnn_matmul(input, weight.t());
  }
  // Not around the call above, which has its output: what oneDNN takes for itself may be of the same size.
  const ForTorch memory(input.size(0) * weight.size(0) * input.element_size());
  if (!one_dnn_does) {
    by_torch.taken();
    return defined(bias) ? at::addmm(*bias, input, weight.t()) : at::linear(input, weight);
  }
  by_one_dnn.taken();
  // The op reads the strides of input and weight, but takes the bias as dense.
  return one_dnn()->typed<OneDnnLinear>().call(
      input, weight, contiguous(bias), "none", c10::List<std::optional<at::Scalar>>(), "");
}

Tensor product_as(at::ScalarType dtype, const Tensor& input, const Tensor& weight) {
  if (dtype == input.scalar_type()) return product(input, weight);
  if (gemm_serves(input, weight)) {
    by_gemm.taken();
    return gemm(dtype, input, weight);
  }
  // As much at a time as is still in the cache when it is widened.
  const int64_t rows = input.size(0), row_bytes = weight.size(0) * input.element_size();
  const int64_t part = std::max<int64_t>(1, widened_bytes / std::max<int64_t>(1, row_bytes));
  widened.taken();
  const Tensor out = empty({rows, weight.size(0)}, dtype);
  for (int64_t row = 0; row < rows; row += part) {
    const int64_t some = std::min(part, rows - row);
    out.narrow(0, row, some).copy_(product(input.narrow(0, row, some), weight));
  }
  return out;
}

}  // namespace nnfast
