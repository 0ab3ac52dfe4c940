#include "memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "../ops/paths.h"

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace nnfast {
namespace {

std::atomic<int64_t> until_failure{-1};
// Where few tokens go through a step, activations of half a MB are most of its memory: from the C library they would
// come on top of what is kept here.
Threshold large("memory.large_bytes", int64_t(512) << 10);

// Torch's allocator, as it was before ours took its place.
c10::Allocator& torchs() {
  static auto* const before = c10::GetCPUAllocator();
  return *before;
}

// From now on torch allocates through ours, for ForTorch and to give back what is kept where memory runs out.
void go_before_torchs();

// torch's own error, where this allocation is to fail: more is asked for than there can be.
void fail_if_due() {
  if (until_failure >= 0 && until_failure-- == 0) torchs().allocate(size_t(1) << 60);
}

#ifdef __linux__

constexpr size_t kPage = 4096;
Threshold huge_page("memory.huge_page", int64_t(2) << 20);
// For so long the most that was live at once says how much may be kept: longer than most training steps take.
Threshold keep_ms("memory.keep_ms", 10'000);
Path mapped("memory.mapped"), gathered("memory.gathered"), given_again("memory.given_again");

char* round_up(char* p, size_t to) { return (char*)(((uintptr_t)p + to - 1) / to * to); }
char* round_down(char* p, size_t to) { return (char*)((uintptr_t)p / to * to); }

class Pool {
 public:
  Pool() {
    // The thread that forks takes the lock first: in the child nobody else could ever release it.
    pthread_atfork([] { pool().mutex_.lock(); }, [] { pool().mutex_.unlock(); }, [] { pool().mutex_.unlock(); });
  }

  // Never destroyed: tensors may outlive everything else at exit.
  static Pool& pool() {
    static auto* const instance = new Pool;
    return *instance;
  }

  // Null where the system has no more. `size` is in whole pages.
  void* take(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = ranges_.end();
    for (auto range = ranges_.begin(); range != ranges_.end(); ++range)
      if (range->second >= size && (best == ranges_.end() || range->second < best->second)) best = range;
    void* data;
    if (best != ranges_.end()) {
      given_again.taken();
      data = best->first;
      split(best, best->first + size);
      ranges_.erase(best);
      kept_ -= size;
    } else {
      mapped.taken();
      data = map(size);
      if (!data) return nullptr;
    }
    live_ += size;
    settle();
    return data;
  }

  void give(char* data, size_t size) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    live_ -= size;
    try {
      auto range = ranges_.emplace(data, size).first;
      kept_ += size;
      range = merge(range, std::next(range));
      if (range != ranges_.begin()) merge(std::prev(range), range);
    } catch (const std::bad_alloc&) {
      munmap(data, size);
    }
    settle();
  }

  MemoryUse use() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {(int64_t)live_, (int64_t)kept_};
  }

  void empty() {
    const std::lock_guard<std::mutex> lock(mutex_);
    trim(0);
    before_ = recent_ = live_;
  }

 private:
  using Clock = std::chrono::steady_clock;
  using Range = std::map<char*, size_t>::iterator;

  // The part of a range from `at` on becomes a range of its own.
  Range split(Range range, char* at) {
    const size_t first = at - range->first;
    if (first == 0) return range;
    if (first == range->second) return std::next(range);
    const auto second = ranges_.emplace_hint(std::next(range), at, range->second - first);
    range->second = first;
    return second;
  }

  Range merge(Range first, Range second) {
    if (second == ranges_.end() || first->first + first->second != second->first) return first;
    first->second += second->second;
    ranges_.erase(second);
    return first;
  }

  // Aligned to huge pages, or the system would find few of them inside.
  static char* map_afresh(size_t size) {
    const size_t huge = huge_page;
    // Not MAP_NORESERVE: the system then refuses what it cannot have, and torch's allocator raises its error.
    char* start = (char*)mmap(nullptr, size + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return nullptr;
    char* aligned = round_up(start, huge);
    if (aligned != start) munmap(start, aligned - start);
    munmap(aligned + size, start + huge - aligned);
    madvise(aligned, size, MADV_HUGEPAGE);
    return aligned;
  }

  // No range is long enough: a new one is mapped, and the huge pages of the kept ranges are moved into it.
  char* map(size_t size) {
    const size_t huge = huge_page;
    char* data = map_afresh(size);
    if (!data) {
      trim(0);
      data = map_afresh(size);
    }
    if (!data) return nullptr;
    char *to = data, *const last = round_down(data + size, huge);
    for (auto range = ranges_.begin(); range != ranges_.end() && to < last;) {
      char* begin = round_up(range->first, huge);
      char* end = std::min(round_down(range->first + range->second, huge), begin + (last - to));
      if (begin >= end) {
        ++range;
        continue;
      }
      try {
        range = split(range, begin);
        split(range, end);
      } catch (const std::bad_alloc&) {
        break;
      }
      gathered.taken();
      kept_ -= end - begin;
      range = ranges_.erase(range);
      for (; begin < end; begin += huge, to += huge)
        if (mremap(begin, huge, huge, MREMAP_MAYMOVE | MREMAP_FIXED, to) == MAP_FAILED) {
          // The system limits mappings. What was at `to` may be gone and another thread's memory be there: it stays.
          munmap(begin, end - begin);
          munmap(data, to - data);
          munmap(to + huge, data + size - (to + huge));
          return map_afresh(size);
        }
    }
    return data;
  }

  // Kept and live together take no more than live ones did, in this stretch of time or in the one before.
  void settle() {
    const auto now = Clock::now();
    const auto stretch = std::chrono::milliseconds(keep_ms);
    if (now - since_ >= stretch) {
      before_ = now - since_ < 2 * stretch ? recent_ : 0;
      recent_ = 0;
      since_ = now;
    }
    recent_ = std::max(recent_, live_);
    trim(std::max(before_, recent_) - live_);
  }

  // The shortest ranges go first, which serve the least.
  void trim(size_t most) {
    while (kept_ > most) {
      const auto range = std::min_element(
          ranges_.begin(), ranges_.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
      const size_t cut = std::min(range->second, kept_ - most);
      munmap(range->first + range->second - cut, cut);
      kept_ -= cut;
      range->second -= cut;
      if (range->second == 0) ranges_.erase(range);
    }
  }

  std::mutex mutex_;
  std::map<char*, size_t> ranges_;  // what is kept, by address; none touches the next
  size_t kept_ = 0, live_ = 0;
  size_t recent_ = 0, before_ = 0;  // the most that was live at once, in this stretch of time and in the one before
  Clock::time_point since_ = Clock::now();
};

struct Block {
  void* data;
  size_t size;
};

void release(void* context) {
  const std::unique_ptr<Block> block(static_cast<Block*>(context));
  c10::reportMemoryUsageToProfiler(block->data, -(int64_t)block->size, 0, 0, at::kCPU);
  Pool::pool().give((char*)block->data, block->size);
}

// From torch's allocator, which also raises the error. Before it does, what is kept goes back to the system.
c10::DataPtr torchs_or_kept(size_t bytes) {
  try {
    return torchs().allocate(bytes);
  } catch (const c10::Error&) {
    if (Pool::pool().use().kept == 0) throw;
  }
  Pool::pool().empty();
  return torchs().allocate(bytes);
}

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    fail_if_due();
    if ((int64_t)bytes < large) return torchs_or_kept(bytes);
    go_before_torchs();
    auto block = std::make_unique<Block>(Block{nullptr, (bytes + kPage - 1) / kPage * kPage});
    block->data = Pool::pool().take(block->size);
    if (!block->data) return torchs_or_kept(bytes);
    c10::reportMemoryUsageToProfiler(block->data, (int64_t)block->size, 0, 0, at::kCPU);
    void* const data = block->data;
    return {data, block.release(), &release, at::Device(at::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Allocator& allocator() {
  static auto* const instance = new Allocator;
  return *instance;
}

#else

c10::Allocator& allocator() { return torchs(); }
c10::DataPtr torchs_or_kept(size_t bytes) { return torchs().allocate(bytes); }

#endif

thread_local size_t awaited = 0;

// The allocator that torch uses from go_before_torchs() on.
class BeforeTorchs final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes && bytes == awaited) return awaited = 0, allocator().allocate(bytes);
    fail_if_due();
    return torchs_or_kept(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return torchs().raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override { torchs().copy_data(to, from, bytes); }
};

void go_before_torchs() {
  static const bool once = [] {
    torchs();
    c10::SetCPUAllocator(new BeforeTorchs);
    return true;
  }();
  (void)once;
}

}  // namespace

ForTorch::ForTorch(int64_t bytes) : before_(awaited) {
  awaited = bytes >= large ? bytes : 0;
  if (awaited) go_before_torchs();
}
ForTorch::~ForTorch() { awaited = before_; }

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  // The user may have told torch to fill new memory, so that a read before any write shows.
  const auto& context = at::globalContext();
  const bool fill = context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
#ifdef __linux__
  if (c10::multiply_integers(sizes) * (int64_t)c10::elementSize(dtype) >= large) {
    at::Tensor block =
        at::detail::empty_generic(sizes, &allocator(), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
    return fill ? at::native::fill_empty_deterministic_(block) : block;
  }
#endif
  return fill ? at::empty(sizes, at::TensorOptions(dtype)) : at::detail::empty_cpu(sizes, dtype);
}

#ifdef __linux__
MemoryUse memory_use() { return Pool::pool().use(); }
void empty_cache() { Pool::pool().empty(); }
#else
MemoryUse memory_use() { return {}; }
void empty_cache() {}
#endif

int64_t fail_allocation(int64_t n) {
  go_before_torchs();
  return until_failure.exchange(n);
}

}  // namespace nnfast
