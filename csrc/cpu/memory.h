// Memory for large outputs on a CPU.
//
// The C library gives a block above 32 MB back to the system when it is freed, and trims its heap below: the next one
// is mapped afresh, and touching it costs a page fault for every 4 KB, several times what the kernel itself takes. So
// blocks from kLarge on come from here: they are mapped with huge pages where the system allows, and up to `keep` bytes
// of freed ones are kept for the next call.
#pragma once

#include <ATen/core/Tensor.h>

namespace nnfast {

// As at::empty; small blocks are at::empty's.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);

// How many bytes of freed blocks may be kept, and how many are.
void set_kept_memory(int64_t bytes);
int64_t kept_memory();

// Whether the whole process's CPU tensors come from here as well.
void serve_all_cpu_tensors();

}  // namespace nnfast
