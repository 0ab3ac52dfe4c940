#include "memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <list>
#include <mutex>

#include "../gate/paths.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace nnfast {
namespace {

#ifdef __linux__

constexpr size_t kPage = 4096, kHugePage = size_t(2) << 20;
Threshold large("memory.large_bytes", kHugePage);
// The most that is kept: one wide activation and its gradient. Without it a GPT-2-style step takes 1.14 times as long.
Threshold keep("memory.keep_bytes", int64_t(128) << 20);
Path mapped("memory.mapped"), given_again("memory.given_again");

struct Block {
  void* data;
  size_t size;  // a multiple of kPage
};

// Freed blocks, the latest first. A block is given out again only for its own size, rounded up to pages.
class Kept {
 public:
  // try_lock, here and below: after a fork the lock may be held for ever by a thread that is no more, and then the
  // system serves.
  void* take(size_t size) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      if (block->size != size) continue;
      void* data = block->data;
      total_ -= size;
      blocks_.erase(block);
      return data;
    }
    return nullptr;
  }

  void give(Block block) {
    std::list<Block> excess;
    {
      std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (!lock)
        excess.push_back(block);
      else {
        blocks_.push_front(block);
        total_ += block.size;
        while ((int64_t)total_ > keep) {
          total_ -= blocks_.back().size;
          excess.splice(excess.end(), blocks_, std::prev(blocks_.end()));
        }
      }
    }
    for (const auto& b : excess) munmap(b.data, b.size);
  }

 private:
  std::mutex mutex_;
  std::list<Block> blocks_;
  size_t total_ = 0;
};

// Never destroyed: tensors may outlive everything else at exit.
Kept& kept() {
  static auto* const instance = new Kept;
  return *instance;
}

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  c10::reportMemoryUsageToProfiler(block->data, -(int64_t)block->size, 0, 0, at::kCPU);
  kept().give(*block);
  delete block;
}

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if ((int64_t)bytes < large) return c10::GetDefaultCPUAllocator()->allocate(bytes);
    if ((int64_t)bytes > keep) return huge(c10::GetDefaultCPUAllocator()->allocate(bytes), bytes);
    const size_t size = (bytes + kPage - 1) / kPage * kPage;
    void* data = kept().take(size);
    (data ? given_again : mapped).taken();
    if (!data) data = map(size);
    c10::reportMemoryUsageToProfiler(data, (int64_t)size, 0, 0, at::kCPU);
    return {data, new Block{data, size}, &release, at::Device(at::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  // Too large to be kept. The C library may have such a block at hand, touched before; if not, it is touched by huge
  // pages.
  static c10::DataPtr huge(c10::DataPtr data, size_t bytes) {
    const auto start = (uintptr_t)data.get(), aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
    madvise((void*)aligned, (start + bytes - aligned) / kHugePage * kHugePage, MADV_HUGEPAGE);
    return data;
  }

  // Aligned to huge pages, or the system would find few of them inside.
  static void* map(size_t size) {
    char* start = (char*)mmap(
        nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(
        start != MAP_FAILED,
        "[enforce fail] nnfast: DefaultCPUAllocator: can't allocate memory: you tried to allocate ", size,
        " bytes. Error code ", errno, " (", std::strerror(errno), ")");
    char* aligned = (char*)(((uintptr_t)start + kHugePage - 1) / kHugePage * kHugePage);
    if (aligned != start) munmap(start, aligned - start);
    munmap(aligned + size, start + kHugePage - aligned);
    madvise(aligned, size, MADV_HUGEPAGE);
    return aligned;
  }
};

Allocator& allocator() {
  static auto* const instance = new Allocator;
  return *instance;
}

#endif

// Where torch is told to fill new memory, so that a read of it shows, its own at::empty does so.
bool fills_new_memory() {
  return at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory();
}

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  if (fills_new_memory()) return at::empty(sizes, at::TensorOptions(dtype));
#ifdef __linux__
  if (c10::multiply_integers(sizes) * (int64_t)c10::elementSize(dtype) >= large)
    return at::detail::empty_generic(
        sizes, &allocator(), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
#endif
  return at::detail::empty_cpu(sizes, dtype);
}

}  // namespace nnfast
