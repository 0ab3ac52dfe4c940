// What a run took: each op and each internal path counts its calls, and each number that chooses between paths has a
// name. Tests assert by the counts that ours served, and lower the numbers so that a small case takes every path. A
// count is one relaxed addition a call, some nanoseconds.
#pragma once

#include <atomic>
#include <cstdint>

namespace nnfast {

// One list for all libraries of ours.
#pragma GCC visibility push(default)

// All objects of a kind. They are made at namespace scope, one after another as a library loads: no lock is needed.
template <class T>
class Listed {
 public:
  static T* first() { return head(); }
  T* next() const { return next_; }

 protected:
  Listed() : next_(head()) { head() = static_cast<T*>(this); }

 private:
  static T*& head() {
    static T* head = nullptr;
    return head;
  }
  T* next_;
};

// `static Path blocked("linear_gelu.blocked");`, and `blocked.taken();` where it is.
class Path : public Listed<Path> {
 public:
  explicit Path(const char* name) : name(name) {}
  void taken() { count.fetch_add(1, std::memory_order_relaxed); }

  const char* const name;
  std::atomic<int64_t> count{0};
};

// `static Threshold block_bytes("linear_gelu.block_bytes", 8 << 20);` stands for its number.
class Threshold : public Listed<Threshold> {
 public:
  Threshold(const char* name, int64_t value) : name(name), value(value) {}
  operator int64_t() const { return value.load(std::memory_order_relaxed); }

  const char* const name;
  std::atomic<int64_t> value;
};

#pragma GCC visibility pop

}  // namespace nnfast
