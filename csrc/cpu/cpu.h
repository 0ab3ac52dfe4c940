// What the CPU implementations of the ops share.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "../ops/rows.h"
#include "kernels.h"

namespace nnfast {

// The kernels of this CPU, or null: neither AVX2 nor AVX-512, or torch was told to use neither
// (ATEN_CPU_CAPABILITY=default).
const Kernels* cpu_kernels();

DType cpu_dtype(const at::Tensor& t);

// Sums over rows, `size` of them side by side, taken by several threads in the accumulation type of `like`.
//
// A long sum of floats that is added up one after another loses digits with every term. So each thread sums a block of
// rows, adds that to a sum of blocks, and kBlocks of those to the last one: the error of a sum of 4096 terms is that of
// three of 16, as in torch's own sum. The threads' sums are added in their order, so a result repeats.
class RowSums {
 public:
  static constexpr int64_t kBlocks = 16, kLevels = 3;

  RowSums(bool wanted, int64_t threads, int64_t size, const at::Tensor& like);
  // Where `thread` adds the rows of a block, or null where no sum is wanted; and the end of a block.
  void* of(int64_t thread) const;
  void end_block(int64_t thread);
  // All of it, as a tensor of `dtype`; undefined where no sum is wanted.
  at::Tensor total(at::IntArrayRef sizes, at::ScalarType dtype) const;

 private:
  void* level(int64_t thread, int64_t k) const;

  int64_t threads_, size_;
  DType dtype_;
  at::Tensor parts_;  // (threads, levels, size)
  std::vector<int64_t> blocks_;
};

// Calls f(thread, begin, end) for block after block of the rows, each thread's rows one run of blocks.
void for_each_block(
    int64_t rows, int64_t size, int64_t threads, const std::function<void(int64_t, int64_t, int64_t)>& f);

// Whether `output` should be written past the caches: where the call touches so many `bytes`, the output among them,
// that it would be evicted before the next op reads it. Such a store also saves reading each line before it is
// overwritten. Every row must start on a line.
bool may_stream(const at::Tensor& output, size_t bytes);
// The same for a kernel that looks for the lines itself.
bool may_stream(size_t bytes);

// How many threads share so much work, of which each takes `least` or more; one at the least.
int64_t threads_for(int64_t work, int64_t least);
// How many threads share `rows` rows of `size` elements: each gets at least some 16k elements, below which one
// more thread costs more than it brings.
int64_t row_grain(int64_t size);
int64_t row_threads(int64_t rows, int64_t size);

}  // namespace nnfast
