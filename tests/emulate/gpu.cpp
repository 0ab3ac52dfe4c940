// Fibers, where they meet, and the few functions of the CUDA runtime that csrc/cuda calls.
//
// Threads of a block run in random order, each until it must wait. What they share only by luck of that order, a wrong
// value shows, or ThreadSanitizer: it is told of the fibers and of every meeting, and of nothing else that orders them.
// Under AddressSanitizer, memory that a block has shared and never written holds a NaN's bytes, and what it did not ask
// for is out of bounds.
#include "gpu.h"

#include "runtime.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace nnfast::cuda {
constexpr size_t kDynamic = 256 << 10;
alignas(16) thread_local char dynamic_shared_memory[kDynamic];
}  // namespace nnfast::cuda

namespace emulate {

namespace {

constexpr size_t kStack = 256 << 10;
constexpr int kWarp = 32, kMostThreads = 1024;

[[noreturn]] void die(const char* what, const char* file = "", int line = 0) {
  std::fprintf(stderr, "emulate: %s (%s:%d), block %u,%u thread %u\n", what, file, line, blockIdx.x, blockIdx.y,
               threadIdx.x);
  std::abort();
}

struct Fiber {
  ucontext_t context;
  char* stack;
  bool ended, waiting;
  const char* file;
  int line;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan;
#endif
};

// Where fibers meet: `wanted` of them, all at one line of the source.
struct Meeting {
  std::vector<int> here;
  char tag;  // whose address ThreadSanitizer knows it by
};

struct Warp {
  Meeting meeting;
  char values[2][kWarp][16];
  int turn[kWarp];
};

std::vector<Fiber> fibers;
std::vector<Warp> warps(kMostThreads / kWarp);
Meeting block_meeting;
ucontext_t scheduler;
int running, count, alive;
std::vector<int> ready;
const std::function<void()>* body;
std::mt19937 order(0);
std::set<const void*> launched;
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_size;
#endif
#if defined(__SANITIZE_THREAD__)
void* scheduler_tsan;
#endif
char end_tag;  // of a block

void acquire(void* tag) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(tag);
#endif
  (void)tag;
}
void release(void* tag) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(tag);
#endif
  (void)tag;
}

void to_scheduler(Fiber& f, bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &f.fake_stack, scheduler_stack, scheduler_stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(scheduler_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  (void)last;
  swapcontext(&f.context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
}

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  Fiber& f = fibers[running];
  (*body)();
  f.ended = true;
  release(&end_tag);
  to_scheduler(f, true);
}

void resume(int i) {
  Fiber& f = fibers[i];
  running = i;
  threadIdx = {static_cast<unsigned>(i), 0, 0};
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, f.stack, kStack);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(f.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&scheduler, &f.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void open(Meeting& m) {
  for (const int i : m.here) {
    fibers[i].waiting = false;
    ready.push_back(i);
  }
  m.here.clear();
}

// The running fiber waits in m until `wanted` are there.
void meet(Meeting& m, size_t wanted, const char* file, int line) {
  Fiber& f = fibers[running];
  f.file = file;
  f.line = line;
  for (const int i : m.here)
    if (fibers[i].line != line || std::strcmp(fibers[i].file, file) != 0)
      die("threads that should meet wait at different lines", file, line);
  release(&m.tag);
  m.here.push_back(running);
  f.waiting = true;
  if (m.here.size() == wanted) open(m);
  to_scheduler(f, false);
  acquire(&m.tag);
}

void run_block() {
  alive = count;
  block_meeting.here.clear();
  for (auto& w : warps) {
    w.meeting.here.clear();
    std::fill(std::begin(w.turn), std::end(w.turn), 0);
  }
  ready.clear();
  for (int i = 0; i < count; ++i) {
    Fiber& f = fibers[i];
    f.ended = f.waiting = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
    ready.push_back(i);
#if defined(__SANITIZE_THREAD__)
    f.tsan = __tsan_create_fiber(0);
#endif
  }
  while (alive) {
    if (ready.empty()) die("every thread waits for another", fibers[running].file, fibers[running].line);
    std::swap(ready[order() % ready.size()], ready.back());
    const int i = ready.back();
    ready.pop_back();
    resume(i);
    if (!fibers[i].ended) continue;
    --alive;
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(fibers[i].tsan);
#endif
    // A thread that has ended counts as one that is at the barrier.
    if (alive && static_cast<int>(block_meeting.here.size()) == alive) open(block_meeting);
  }
  acquire(&end_tag);
}

}  // namespace

int lane() { return running % kWarp; }

void sync_block(const char* file, int line) { meet(block_meeting, alive, file, line); }

void shuffle(unsigned mask, void* value, size_t size, int from, const char* file, int line) {
  Warp& w = warps[running / kWarp];
  const int me = lane(), turn = w.turn[me]++ % 2;
  if (!(mask >> me & 1)) die("a lane that its own mask does not name", file, line);
  std::memcpy(w.values[turn][me], value, size);
  const int first = running - me;
  for (int k = 0; k < kWarp; ++k)
    if ((mask >> k & 1) && (first + k >= count || fibers[first + k].ended))
      die("a lane that the mask names has ended", file, line);
  meet(w.meeting, __builtin_popcount(mask), file, line);
  if (!(mask >> from & 1)) die("a lane that the mask does not name is read", file, line);
  std::memcpy(value, w.values[turn][from], size);
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& one) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (!grid.x || !grid.y || grid.x > 0x7fffffffu || grid.y > 65535 || block.y != 1 || block.z != 1 ||
      block.x > kMostThreads)
    return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > nnfast::cuda::kDynamic) return cudaErrorInvalidValue;
  count = static_cast<int>(block.x);
  while (fibers.size() < block.x) {
    fibers.emplace_back();
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) die("no memory for a stack");
    fibers.back().stack = static_cast<char*>(stack);
  }
  body = &one;
  launched.insert(kernel);
  blockDim = block;
  gridDim = grid;
  char* const shared = nnfast::cuda::dynamic_shared_memory;
#if defined(__SANITIZE_THREAD__)
  scheduler_tsan = __tsan_get_current_fiber();
#endif
  std::vector<unsigned> blocks(grid.x * grid.y);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), order);
  for (const unsigned b : blocks) {
    blockIdx = {b % grid.x, b / grid.x, 0};
    std::memset(shared, 0xff, config.dynamicSmemBytes);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(shared + config.dynamicSmemBytes, nnfast::cuda::kDynamic - config.dynamicSmemBytes);
#endif
    run_block();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(shared, nnfast::cuda::kDynamic);
#endif
  }
  return cudaSuccess;
}

namespace {
int multiprocessors = 2, shared_memory = 227 << 10;
thread_local int left = -1;
}  // namespace

void set_device(int processors, int shared) {
  multiprocessors = processors;
  shared_memory = shared;
}
int kernels_launched(size_t* offsets, int room) {
  Dl_info info;
  int n = 0;
  for (const void* kernel : launched)
    if (dladdr(kernel, &info) && n < room)
      offsets[n++] = static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase);
  return n;
}
void set_order(unsigned seed) { order.seed(seed); }
bool memory_left() {
  if (left < 0) return true;
  if (left == 0) return false;
  --left;
  return true;
}
void set_memory_left(int count) { left = count; }

}  // namespace emulate

// ---- the runtime ----

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  if (name == cudaDevAttrMultiProcessorCount)
    *value = emulate::multiprocessors;
  else if (name == cudaDevAttrMaxSharedMemoryPerBlockOptin)
    *value = emulate::shared_memory;
  else
    return cudaErrorInvalidValue;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (!emulate::memory_left()) return cudaErrorMemoryAllocation;
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
