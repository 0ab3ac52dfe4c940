// The product of two matrices on a CPU: memory and threads. The arithmetic is in gemm.h.
#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>

#include <algorithm>

#include "../ops/paths.h"
#include "cpu.h"
#include "memory.h"
#include "product.h"

namespace nnfast {
namespace {

// How much of c is summed up at a time: the sums, floats, stay in the last cache over all blocks of k.
Threshold sum_rows("gemm.rows", 1024), sum_columns("gemm.columns", 1024);
// Rows of a that a thread lays out at a time: with a depth of 256 half of the second cache of most CPUs.
Threshold thread_rows("gemm.thread_rows", 120);
// What a thread multiplies and adds at the least.
Threshold thread_multiply_adds("gemm.thread_multiply_adds", 200'000);

// Holds what `view` points to.
struct Operand {
  Tensor tensor;
  Gemm::Matrix view;

  explicit Operand(const Tensor& t) {
    const bool by_rows = t.stride(1) == 1 || t.size(1) == 1, by_columns = t.stride(0) == 1 || t.size(0) == 1;
    tensor = by_rows || by_columns ? t : t.contiguous();
    view.p = tensor.const_data_ptr();
    view.strides[0] = by_columns && !by_rows ? 1 : tensor.stride(0);
    view.strides[1] = by_columns && !by_rows ? tensor.stride(1) : 1;
  }
};

// Begin and size of part i of n in `parts` parts, of whole steps but for the last.
std::pair<int64_t, int64_t> part_of(int64_t n, int64_t parts, int64_t i, int64_t step) {
  const int64_t steps = at::ceil_div(n, step), begin = std::min(n, steps * i / parts * step);
  return {begin, std::min(n, steps * (i + 1) / parts * step) - begin};
}

}  // namespace

Tensor gemm(at::ScalarType dtype, const Tensor& a_, const Tensor& b_, const OptTensor& bias) {
  const auto& kernels = *cpu_kernels();
  const Operand a(a_), b(b_);
  const OptTensor dense = contiguous(bias);
  Tensor c = empty({a_.size(0), b_.size(0)}, dtype);
  const Gemm f{
      .dtype = cpu_dtype(a_),
      .out_dtype = cpu_dtype(c),
      .m = a_.size(0),
      .n = b_.size(0),
      .k = a_.size(1),
      .a = a.view,
      .b = b.view,
      .bias = data(dense),
      .c = c.mutable_data_ptr()};
  const int64_t panel = kernels.gemm_columns, tile = kernels.gemm_rows, rows = std::min<int64_t>(f.m, sum_rows);
  const int64_t columns = std::min(at::round_up(f.n, panel), at::round_up(int64_t{sum_columns}, panel));
  const int64_t threads = threads_for(f.m * f.n * f.k, thread_multiply_adds);
  // Blocks of rows for all threads alike; where there are too few rows for that, threads share the columns as well.
  int64_t row_parts = at::round_up(at::ceil_div(rows, int64_t{thread_rows}), threads);
  row_parts = std::max<int64_t>(1, std::min(row_parts, rows / (4 * tile)));
  const int64_t column_parts = std::min(at::ceil_div(threads, row_parts), columns / panel);
  const int64_t parts = row_parts * column_parts;
  const int64_t depth = std::min(f.k, Gemm::kDepth), a_size = (rows / row_parts + 2 * tile) * depth + 16;

  const Tensor space = empty({columns * depth + rows * columns + threads * a_size}, at::kFloat);
  float *const laid = space.mutable_data_ptr<float>(), *const sums = laid + columns * depth;
  float* const rooms = sums + rows * columns;
  const auto for_each = [&](int64_t count, auto&& body) {
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        for (int64_t i = count * t / threads; i < count * (t + 1) / threads; ++i) body(t, i);
    });
  };
  // b_part: where the part's columns are laid out.
  const auto multiply = [&](const GemmPart& whole, int64_t thread, const GemmPart& part, const float* b_part) {
    const int64_t r = part.row - whole.row, n = part.column - whole.column;
    kernels.gemm(f, part, b_part, sums + r * columns + n, columns, rooms + thread * a_size);
  };
  for (int64_t row = 0; row < f.m; row += rows)
    for (int64_t column = 0; column < f.n; column += columns) {
      GemmPart whole{row, std::min(rows, f.m - row), column, std::min(columns, f.n - column)};
      const auto part_at = [&](int64_t i) {
        GemmPart part = whole;
        const auto [r, part_rows] = part_of(whole.rows, row_parts, i % row_parts, tile);
        const auto [n, part_columns] = part_of(whole.columns, column_parts, i / row_parts, panel);
        part.row += r, part.rows = part_rows, part.column += n, part.columns = part_columns;
        return part;
      };
      const auto over_depth = [&](GemmPart part, auto&& body) {
        for (part.k0 = 0; part.k0 < f.k; part.k0 += depth) {
          part.depth = std::min(depth, f.k - part.k0);
          body(part);
        }
      };
      // Few rows: each thread lays out the columns that it reads, and waits for no other. Its part of the room stays
      // the same in the last block of k, which is smaller, for other threads may still be at the block before.
      if (row_parts == 1) {
        for_each(parts, [&](int64_t thread, int64_t i) {
          const GemmPart own = part_at(i);
          float* const b_part = laid + (own.column - column) * depth;
          over_depth(own, [&](const GemmPart& part) {
            kernels.gemm_pack(f, part, b_part);
            multiply(whole, thread, part, b_part);
          });
        });
        continue;
      }
      over_depth(whole, [&](const GemmPart& block) {
        for_each(at::ceil_div(whole.columns, panel), [&](int64_t, int64_t i) {
          GemmPart part = block;
          part.column += i * panel, part.columns = std::min(panel, whole.columns - i * panel);
          kernels.gemm_pack(f, part, laid + i * panel * part.depth);
        });
        for_each(parts, [&](int64_t thread, int64_t i) {
          GemmPart part = part_at(i);
          part.k0 = block.k0, part.depth = block.depth;
          multiply(whole, thread, part, laid + (part.column - column) * part.depth);
        });
      });
    }
  return c;
}

}  // namespace nnfast
