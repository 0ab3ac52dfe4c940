// Memory for large outputs on a CPU.
//
// The C library gives a block above 32 MB back to the system when it is freed, and trims its heap below: the next one
// is mapped afresh, and touching it costs a page fault for every 4 KB, several times what the kernel itself takes. So
// blocks from kLarge on come from here: they are mapped with huge pages where the system allows, and up to 128 MB of
// freed ones are kept for the next call. A larger one is the C library's, with huge pages. The rest of the process
// keeps the allocator it had.
#pragma once

#include <ATen/core/Tensor.h>

namespace nnfast {

// As at::empty; small blocks are at::empty's.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);

}  // namespace nnfast
