// Memory for large outputs on a CPU.
//
// The C library gives a block above 32 MB back to the system when it is freed, and trims its heap below: the next one
// is mapped afresh, and touching it costs a page fault for every 4 KB, several times what the kernel itself takes. So
// blocks from half a MB on come from here, and freed ones are kept for the next call. What is kept is memory that the
// process has needed: kept and live blocks together never take more than live ones did. What was not needed for some
// seconds goes back to the system at the next call, and all of it when asked or when somebody would find no memory.
//
// Torch's CPU allocator is replaced by one that hands every other request on to it (go_before_torchs): so an op of
// torch's can write its output into memory of ours, and what is kept is given back before torch says that there is
// none.
#pragma once

#include <ATen/core/Tensor.h>

namespace nnfast {

// As at::empty; small blocks are at::empty's.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);

// While one lives, the first memory of just so many bytes that torch takes on this thread comes as empty()'s does: the
// output of its op. (What oneDNN takes for itself afterwards has to be torch's.)
class ForTorch {
 public:
  explicit ForTorch(int64_t bytes);
  ~ForTorch();
  ForTorch(const ForTorch&) = delete;

 private:
  size_t before_;
};

// Bytes of blocks in use, and of those that are kept.
struct MemoryUse {
  int64_t live, kept;
};
MemoryUse memory_use();

// Gives all that is kept back to the system.
void empty_cache();

// For tests: of the allocations from now on, torch's and ours, number n fails, counted from 0; none where n is
// negative. Returns how many were still to go, negative if the one before has failed.
int64_t fail_allocation(int64_t n);

}  // namespace nnfast
