// Fibers, where they meet, and the few functions of the CUDA runtime that csrc/cuda calls.
//
// Threads of a block run in random order, each until it must wait. What they share only by luck of that order, a wrong
// value shows, or ThreadSanitizer: it is told of the fibers and of every meeting, and of nothing else that orders them.
// Under AddressSanitizer, memory that a block has shared and never written holds a NaN's bytes, and what it did not ask
// for is out of bounds.
#include "gpu.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMULATE_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace nnfast::cuda {
constexpr size_t kDynamic = 256 << 10;
alignas(16) thread_local char dynamic_shared_memory[kDynamic];
}  // namespace nnfast::cuda

#if !defined(__x86_64__)
#error "fibers switch in x86-64's own words here"
#endif
// Puts the registers that a call keeps on this stack, where it stands into *from, and goes on where `to` stands.
// ucontext would ask the kernel for the signals at each switch.
extern "C" void emulate_switch(void** from, void* to);
asm(R"(
.text
.type emulate_switch, @function
emulate_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace emulate {

namespace {

constexpr size_t kStack = 256 << 10;
constexpr int kWarp = 32, kMostThreads = 1024;

[[noreturn]] void die(const char* what, const char* file = "", int line = 0) {
  std::fprintf(
      stderr, "emulate: %s (%s:%d), block %u,%u thread %u\n", what, file, line, blockIdx.x, blockIdx.y, threadIdx.x);
  std::abort();
}

struct Fiber {
  void* at;  // where it stands on its stack, while another runs
  char* stack;
  bool ended;
  const char* file;
  int line;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
#endif
#if defined(EMULATE_TSAN)
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
  uint32_t values[2][kWarp];
  int turn[kWarp];
  unsigned ended;  // lanes that have
};

std::deque<Fiber> fibers;
std::vector<Warp> warps(kMostThreads / kWarp);
Meeting block_meeting;
void* scheduler;  // where it stands
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
#if defined(EMULATE_TSAN)
void* scheduler_tsan;
#endif
char start_tag, end_tag;  // of a block

void acquire(void* tag) {
#if defined(EMULATE_TSAN)
  __tsan_acquire(tag);
#endif
  (void)tag;
}
void release(void* tag) {
#if defined(EMULATE_TSAN)
  __tsan_release(tag);
#endif
  (void)tag;
}

void to_scheduler(Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&f.fake_stack, scheduler_stack, scheduler_stack_size);
#endif
#if defined(EMULATE_TSAN)
  __tsan_switch_to_fiber(scheduler_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  emulate_switch(&f.at, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
}

// A fiber outlives its block, and runs the same thread of the next.
void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  for (const int i = running;;) {
    acquire(&start_tag);
    (*body)();
    fibers[i].ended = true;
    release(&end_tag);
    to_scheduler(fibers[i]);
  }
}

void resume(int i) {
  Fiber& f = fibers[i];
  running = i;
  threadIdx = {static_cast<unsigned>(i), 0, 0};
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, f.stack, kStack);
#endif
#if defined(EMULATE_TSAN)
  __tsan_switch_to_fiber(f.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  emulate_switch(&scheduler, f.at);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void open(Meeting& m) {
  for (const int i : m.here) {
    ready.push_back(i);
  }
  m.here.clear();
}

// The running fiber waits in m until `wanted` are there.
void meet(Meeting& m, size_t wanted, const char* file, int line) {
  Fiber& f = fibers[running];
  f.file = file;
  f.line = line;
  if (!m.here.empty() && (fibers[m.here[0]].line != line || std::strcmp(fibers[m.here[0]].file, file) != 0))
    die("threads that should meet wait at different lines", file, line);
  release(&m.tag);
  m.here.push_back(running);
  if (m.here.size() == wanted) open(m);
  to_scheduler(f);
  acquire(&m.tag);
}

void run_block() {
  alive = count;
  block_meeting.here.clear();
  for (auto& w : warps) {
    w.meeting.here.clear();
    w.ended = 0;
    std::fill(std::begin(w.turn), std::end(w.turn), 0);
  }
  ready.clear();
  for (int i = 0; i < count; ++i) {
    Fiber& f = fibers[i];
    f.ended = false;
    ready.push_back(i);
  }
  release(&start_tag);
  while (alive) {
    if (ready.empty()) die("every thread waits for another", fibers[running].file, fibers[running].line);
    std::swap(ready[order() % ready.size()], ready.back());
    const int i = ready.back();
    ready.pop_back();
    resume(i);
    if (!fibers[i].ended) continue;
    --alive;
    warps[i / kWarp].ended |= 1u << i % kWarp;
    // A thread that has ended counts as one that is at the barrier.
    if (alive && static_cast<int>(block_meeting.here.size()) == alive) open(block_meeting);
  }
  acquire(&end_tag);
}

}  // namespace

int lane() { return running % kWarp; }

void sync_block(const char* file, int line) { meet(block_meeting, alive, file, line); }

uint32_t shuffle(unsigned mask, uint32_t value, int from, const char* file, int line) {
  Warp& w = warps[running / kWarp];
  const int me = lane(), turn = w.turn[me]++ % 2;
  if (mask & w.ended) die("a lane that the mask names has ended", file, line);
  if (!(mask >> me & mask >> from & 1)) die("a lane that the mask does not name", file, line);
  w.values[turn][me] = value;
  meet(w.meeting, __builtin_popcount(mask), file, line);
  return w.values[turn][from];
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& one) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (!grid.x || !grid.y || grid.x > 0x7fffffffu || grid.y > 65535 || block.y != 1 || block.z != 1 ||
      block.x > kMostThreads)
    return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > nnfast::cuda::kDynamic) return cudaErrorInvalidValue;
  count = static_cast<int>(block.x);
  ready.reserve(kMostThreads);
  block_meeting.here.reserve(kMostThreads);
  for (auto& w : warps) w.meeting.here.reserve(kWarp);
  while (fibers.size() < block.x) {
    fibers.emplace_back();
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) die("no memory for a stack");
    Fiber& f = fibers.back();
    f.stack = static_cast<char*>(stack);
    // As after a call of entry(): six registers, where to return to, and 8 bytes short of a multiple of 16.
    void** top = reinterpret_cast<void**>(f.stack + kStack) - 1;
    *--top = reinterpret_cast<void*>(entry);
    f.at = top - 6;
#if defined(EMULATE_TSAN)
    f.tsan = __tsan_create_fiber(0);
#endif
  }
  body = &one;
  launched.insert(kernel);
  blockDim = block;
  gridDim = grid;
  char* const shared = nnfast::cuda::dynamic_shared_memory;
#if defined(EMULATE_TSAN)
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
bool images = true;
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
void set_images(bool there) { images = there; }
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
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return emulate::images ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
