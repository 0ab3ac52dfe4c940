#include "cpu.h"

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "../ops/paths.h"
#include "memory.h"

namespace nnfast {

// How much of the last cache a core can count on. The system is not asked: on a virtual machine it may name the whole
// host's.
static Threshold stream_bytes("stream_bytes", int64_t(32) << 20);
static Path streamed("streamed");
// Elements a thread takes at the least: below, waking one more costs more than it brings.
static Threshold thread_elements("thread_elements", 16384);

const Kernels* cpu_kernels() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const Kernels* const chosen = []() -> const Kernels* {
    const auto capability = at::get_cpu_capability();
    if (!__builtin_cpu_supports("f16c")) return nullptr;
    // What an older CPU would take, for tests; ATEN_CPU_CAPABILITY knows no such step.
    const bool older = std::getenv("NNFAST_NO_AVX512_BF16");
    if (capability == "AVX512")
      return __builtin_cpu_supports("avx512bf16") && !older ? &avx512_bf16::kernels : &avx512::kernels;
    if (capability == "AVX2") return &avx2::kernels;
    return nullptr;
  }();
  return chosen;
#else
  return nullptr;
#endif
}

DType cpu_dtype(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default: TORCH_CHECK_NOT_IMPLEMENTED(false, "nnfast has no CPU kernel for ", t.scalar_type());
  }
}

RowSums::RowSums(bool wanted, int64_t threads, int64_t size, const at::Tensor& like)
    : threads_(threads), size_(size), dtype_(cpu_dtype(like)) {
  if (!wanted) return;
  parts_ = empty({threads, kLevels, size}, at::toOpMathType(like.scalar_type()));
  std::memset(parts_.mutable_data_ptr(), 0, parts_.nbytes());
  blocks_.resize(threads);
}

void* RowSums::level(int64_t thread, int64_t k) const {
  return (char*)parts_.mutable_data_ptr() + (thread * kLevels + k) * size_ * parts_.element_size();
}

void* RowSums::of(int64_t thread) const { return parts_.defined() ? level(thread, 0) : nullptr; }

void RowSums::end_block(int64_t thread) {
  if (!parts_.defined()) return;
  cpu_kernels()->move_sums(dtype_, level(thread, 1), level(thread, 0), size_);
  if (++blocks_[thread] % kBlocks == 0) cpu_kernels()->move_sums(dtype_, level(thread, 2), level(thread, 1), size_);
}

at::Tensor RowSums::total(at::IntArrayRef sizes, at::ScalarType dtype) const {
  if (!parts_.defined()) return {};
  at::Tensor out = empty(sizes, dtype);
  // Sums of float go to float or 16 bits, sums of double to double: the type of `out` says which.
  cpu_kernels()->sum_parts(cpu_dtype(out), parts_.const_data_ptr(), threads_ * kLevels, size_, out.mutable_data_ptr());
  return out;
}

void for_each_block(
    int64_t rows, int64_t size, int64_t threads, const std::function<void(int64_t, int64_t, int64_t)>& f) {
  // Very short rows in longer blocks, or the ends of the blocks would be most of the work.
  const int64_t block = size >= 64 ? 16 : 64;
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const int64_t end = rows * (t + 1) / threads;
      for (int64_t begin = rows * t / threads; begin < end; begin += block) f(t, begin, std::min(begin + block, end));
    }
  });
}

bool may_stream(const at::Tensor& output, size_t bytes) {
  constexpr size_t kLine = 64;
  return output.dim() > 0 && output.size(-1) * output.element_size() % kLine == 0 &&
         (uintptr_t)output.const_data_ptr() % kLine == 0 && may_stream(bytes);
}

bool may_stream(size_t bytes) {
  const bool may = bytes >= (size_t)stream_bytes;
  if (may) streamed.taken();
  return may;
}

int64_t row_grain(int64_t size) { return std::max<int64_t>(1, thread_elements / std::max<int64_t>(1, size)); }

int64_t threads_for(int64_t work, int64_t least) {
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), work / least));
}

int64_t row_threads(int64_t rows, int64_t size) { return threads_for(rows, row_grain(size)); }

}  // namespace nnfast
