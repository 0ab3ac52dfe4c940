// Fibers, where they meet, and the few functions of the CUDA runtime that csrc/cuda calls.
//
// Threads of a block run in random order, each until it must wait. A missing barrier shows by a wrong value, or to
// ThreadSanitizer, which is told of the fibers and of every meeting, and of nothing else that orders them. Shared
// memory starts as a NaN's bytes; under AddressSanitizer, what a block did not ask for is out of bounds.
//
// `__shared__` is thread_local here, so the blocks of a cluster, which are there together, have a thread of the system
// each. One of these runs at a time, and they wait for each other unseen by ThreadSanitizer.
#include "gpu.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <thread>
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
// Pushes the registers that a call must keep, writes the top of this stack to *from, and goes on with the stack `to`.
// ucontext would ask the system for the signal mask at each switch.
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
constexpr int kWarp = 32, kMostThreads = 1024, kMostBlocks = 8;

[[noreturn]] void die(const char* what, const char* file = "", int line = 0) {
  std::fprintf(
      stderr, "emulate: %s (%s:%d), block %u,%u thread %u\n", what, file, line, blockIdx.x, blockIdx.y, threadIdx.x);
  std::abort();
}

struct Fiber {
  void* at;  // where it stands on its stack, while another runs
  char* stack;
  bool ended, waited;
  const char* file;
  int line;
  std::deque<Copy> copies;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
#endif
#if defined(EMULATE_TSAN)
  void* tsan;
#endif
};

// A thread: its block's rank in the cluster, and its number in the block.
struct Id {
  int rank, i;
};

// Where fibers meet: `wanted` of them, all at one line of the source.
struct Meeting {
  std::vector<Id> here;
  char tag;  // whose address ThreadSanitizer knows it by
};

struct Warp {
  Meeting meeting;
  uint32_t values[2][kWarp];
  int turn[kWarp];
  unsigned ended;  // lanes that have
};

struct Block {
  std::deque<Fiber> fibers;
  std::vector<Warp> warps = std::vector<Warp>(kMostThreads / kWarp);
  Meeting meeting;
  void* scheduler;  // where it stands
  char* shared = nullptr;
  uint3 index;
  int alive;
  bool started;
  // The thread of the system that runs it, where that is not the one that launches: the fiber it shall resume, or -1.
  std::thread thread;
  std::atomic<int> turn{-1};
#if defined(__SANITIZE_ADDRESS__)
  void* scheduler_fake_stack;
  const void* scheduler_stack;
  size_t scheduler_stack_size;
#endif
#if defined(EMULATE_TSAN)
  void* scheduler_tsan;
#endif
};

Block (&blocks)[kMostBlocks] = *new Block[1][kMostBlocks];  // by rank; their threads never end
Meeting cluster_meeting;
Id running;
int count, cluster, alive;
bool overlaps;
std::vector<Id> ready;
const std::function<void()>* body;
std::mt19937 order(0);
std::set<const void*> launched;
std::map<const void*, size_t> allowed;  // shared memory that a kernel was allowed
char start_tag, end_tag;                // of a block

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

Fiber& fiber(Id id) { return blocks[id.rank].fibers[id.i]; }

void to_scheduler(Id id) {
  [[maybe_unused]] Block& b = blocks[id.rank];
  Fiber& f = fiber(id);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&f.fake_stack, b.scheduler_stack, b.scheduler_stack_size);
#endif
#if defined(EMULATE_TSAN)
  __tsan_switch_to_fiber(b.scheduler_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  emulate_switch(&f.at, b.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
}

// A fiber outlives its block, and runs the same thread of the next.
void entry() {
  const Id id = running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &blocks[id.rank].scheduler_stack, &blocks[id.rank].scheduler_stack_size);
#endif
  for (;;) {
    acquire(&start_tag);
    (*body)();
    if (overlaps && !fiber(id).waited) die("a kernel that may overlap did not wait for the one before");
    fiber(id).ended = true;
    release(&end_tag);
    to_scheduler(id);
  }
}

// In the thread of the system that is the block's.
void resume_here(Block& b, Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&b.scheduler_fake_stack, f.stack, kStack);
#endif
#if defined(EMULATE_TSAN)
  __tsan_switch_to_fiber(f.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  emulate_switch(&b.scheduler, f.at);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(b.scheduler_fake_stack, nullptr, nullptr);
#endif
}
void start_here(Block& b) {
  b.shared = nnfast::cuda::dynamic_shared_memory;
#if defined(EMULATE_TSAN)
  b.scheduler_tsan = __tsan_get_current_fiber();
#endif
  release(&start_tag);
}
void run_thread(Block& b) {
  start_here(b);
  for (;;) {
    b.turn.store(-1);
    b.turn.notify_all();
    b.turn.wait(-1);
    resume_here(b, b.fibers[b.turn]);
  }
}

void resume(Id id) {
  Block& b = blocks[id.rank];
  running = id;
  threadIdx = {static_cast<unsigned>(id.i), 0, 0};
  blockIdx = b.index;
  if (id.rank == 0) return resume_here(b, fiber(id));
  b.turn.store(id.i);
  b.turn.notify_all();
  b.turn.wait(id.i);
}

void open(Meeting& m) {
  for (const Id id : m.here) {
    ready.push_back(id);
  }
  m.here.clear();
}

// The running fiber waits in m until `wanted` are there.
void meet(Meeting& m, size_t wanted, const char* file, int line) {
  const Id id = running;
  Fiber& f = fiber(id);
  f.file = file;
  f.line = line;
  if (!m.here.empty() && (fiber(m.here[0]).line != line || std::strcmp(fiber(m.here[0]).file, file) != 0))
    die("threads that should meet wait at different lines", file, line);
  release(&m.tag);
  m.here.push_back(id);
  if (m.here.size() == wanted) open(m);
  to_scheduler(id);
  acquire(&m.tag);
}

void start(Block& b, int rank) {
  b.started = true;
  for (int i = 0; i < count; ++i) {
    Fiber& f = b.fibers[i];
    f.ended = f.waited = false;
    f.copies.clear();
    ready.push_back({rank, i});
  }
}

void run_cluster(int shared) {
  alive = count * cluster;
  cluster_meeting.here.clear();
  ready.clear();
  for (int r = 0; r < cluster; ++r) {
    Block& b = blocks[r];
    b.alive = count;
    b.started = false;
    b.meeting.here.clear();
    for (auto& w : b.warps) {
      w.meeting.here.clear();
      w.ended = 0;
      std::fill(std::begin(w.turn), std::end(w.turn), 0);
    }
    std::memset(b.shared, 0xff, shared);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(b.shared + shared, nnfast::cuda::kDynamic - shared);
#endif
  }
  int started = 0;
  const int first = order() % cluster;
  // A block of a cluster may start much later than another: soon, or when no other can go on.
  const bool soon = order() % 2;
  release(&start_tag);
  while (alive) {
    if (started < cluster && (ready.empty() || (soon && order() % 256 == 0))) {
      const int rank = (first + started++) % cluster;
      start(blocks[rank], rank);
    }
    if (ready.empty()) die("every thread waits for another", fiber(running).file, fiber(running).line);
    std::swap(ready[order() % ready.size()], ready.back());
    const Id id = ready.back();
    ready.pop_back();
    resume(id);
    if (!fiber(id).ended) continue;
    Block& b = blocks[id.rank];
    --alive;
    --b.alive;
    b.warps[id.i / kWarp].ended |= 1u << id.i % kWarp;
    // A thread that has ended counts as one that is at the barrier.
    if (b.alive && static_cast<int>(b.meeting.here.size()) == b.alive) open(b.meeting);
    if (alive && static_cast<int>(cluster_meeting.here.size()) == alive) open(cluster_meeting);
  }
  acquire(&end_tag);
#if defined(__SANITIZE_ADDRESS__)
  for (int r = 0; r < cluster; ++r) __asan_unpoison_memory_region(blocks[r].shared, nnfast::cuda::kDynamic);
#endif
}

// As many fibers as threads, for each block of a cluster, and for each block but the first a thread of the system.
void make_fibers() {
  for (int r = 0; r < cluster; ++r) {
    Block& b = blocks[r];
    b.meeting.here.reserve(kMostThreads);
    for (auto& w : b.warps) w.meeting.here.reserve(kWarp);
    while (static_cast<int>(b.fibers.size()) < count) {
      b.fibers.emplace_back();
      void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) die("no memory for a stack");
      Fiber& f = b.fibers.back();
      f.stack = static_cast<char*>(stack);
      // As after a call of entry(): six registers, where to return to, and 8 bytes short of a multiple of 16.
      void** top = reinterpret_cast<void**>(f.stack + kStack) - 1;
      *--top = reinterpret_cast<void*>(entry);
      f.at = top - 6;
#if defined(EMULATE_TSAN)
      f.tsan = __tsan_create_fiber(0);
#endif
    }
    if (r == 0) {
      start_here(b);
    } else if (!b.thread.joinable()) {
      b.turn = 0;
      b.thread = std::thread(run_thread, std::ref(b));
      b.turn.wait(0);
    }
  }
}

}  // namespace

int lane() { return running.i % kWarp; }
int cluster_size() { return cluster; }
int cluster_rank() { return running.rank; }
std::deque<Copy>& copies() { return fiber(running).copies; }
void wait_for_kernel_before() { fiber(running).waited = true; }

void sync_block(const char* file, int line) {
  Block& b = blocks[running.rank];
  meet(b.meeting, b.alive, file, line);
}
void sync_cluster(const char* file, int line) { meet(cluster_meeting, alive, file, line); }

ptrdiff_t to_shared_memory_of(int rank) {
  if (rank >= cluster) die("a block that is not of the cluster");
  if (!blocks[rank].started || !blocks[rank].alive) die("shared memory of a block that does not run");
  return blocks[rank].shared - blocks[running.rank].shared;
}

uint32_t shuffle(unsigned mask, uint32_t value, int from, const char* file, int line) {
  Warp& w = blocks[running.rank].warps[running.i / kWarp];
  const int me = lane(), turn = w.turn[me]++ % 2;
  if (mask & w.ended) die("a lane that the mask names has ended", file, line);
  if (!(mask >> me & mask >> from & 1)) die("a lane that the mask does not name", file, line);
  w.values[turn][me] = value;
  meet(w.meeting, __builtin_popcount(mask), file, line);
  return w.values[turn][from];
}

namespace {
int multiprocessors = 2, shared_memory = 227 << 10;
thread_local int left = -1;
bool images = true;
int current_device = 0, ptx_version = 90, clusters = 1;
bool clusters_launch = true;
}  // namespace

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& one) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  cluster = 1;
  overlaps = false;
  for (const auto* a = config.attrs; a < config.attrs + config.numAttrs; ++a) {
    if (a->id == cudaLaunchAttributeClusterDimension) cluster = a->val.clusterDim.x;
    if (a->id == cudaLaunchAttributeProgrammaticStreamSerialization) overlaps = true;
  }
  if (!grid.x || !grid.y || grid.x > 0x7fffffffu || grid.y > 65535 || block.y != 1 || block.z != 1 ||
      block.x > kMostThreads)
    return cudaErrorInvalidConfiguration;
  if (cluster > kMostBlocks || grid.x % cluster || (cluster > 1 && !clusters_launch))
    return cudaErrorInvalidClusterSize;
  if ((cluster > 1 || overlaps) && ptx_version < 90) die("what a Hopper GPU can, in code for an older one");
  // CUDA gives 48 KB unasked; 16 of them are left for what a kernel declares itself.
  if (config.dynamicSmemBytes > std::max<size_t>(32 << 10, allowed[kernel])) return cudaErrorInvalidValue;
  if (config.dynamicSmemBytes > nnfast::cuda::kDynamic) return cudaErrorInvalidValue;
  count = static_cast<int>(block.x);
  ready.reserve(kMostThreads * cluster);
  cluster_meeting.here.reserve(kMostThreads * cluster);
  make_fibers();
  body = &one;
  launched.insert(kernel);
  blockDim = block;
  gridDim = grid;
  std::vector<unsigned> starts(grid.x * grid.y / cluster);
  std::iota(starts.begin(), starts.end(), 0u);
  std::shuffle(starts.begin(), starts.end(), order);
  for (const unsigned s : starts) {
    for (int r = 0; r < cluster; ++r) blocks[r].index = {(s * cluster + r) % grid.x, (s * cluster + r) / grid.x, 0};
    run_cluster(static_cast<int>(config.dynamicSmemBytes));
  }
  return cudaSuccess;
}

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
void set_clusters(int device, int ptx, int most, bool launch) {
  current_device = device;
  ptx_version = ptx;
  clusters = most;
  clusters_launch = launch;
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
cudaError_t cudaGetDevice(int* device) { return *device = emulate::current_device, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  if (name == cudaDevAttrMultiProcessorCount)
    *value = emulate::multiprocessors;
  else if (name == cudaDevAttrMaxSharedMemoryPerBlockOptin)
    *value = emulate::shared_memory;
  else
    return cudaErrorInvalidValue;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  found->ptxVersion = emulate::ptx_version;
  return emulate::images ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  emulate::allowed[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t*) {
  return *count = emulate::clusters, cudaSuccess;
}
