// Which kernels are known to be right on this GPU. Before the first call nnfast/selftest.py compares a small case with
// torch's op, and its answer is kept. So kernels that nobody has tried there, or a bad driver, give no wrong result.
#pragma once

#include <torch/csrc/Exceptions.h>

#include <algorithm>
#include <array>
#include <bit>

#include "../ops/op.h"

namespace nnfast {

// plain_thread(), and no function mode, no forward-mode AD. Asks Python.
bool ordinary_thread();

// No mutex: every caller holds Python's lock.
class KnownAnswers {
 public:
  static constexpr size_t kMostOps = 16;

  // Sets who answers; null: all kernels count as right. Forgets earlier answers. `on_cpu`, for tests: tries a CPU too.
  void ask(PyObject* whom, bool on_cpu) {
    Py_XINCREF(whom);
    Py_XDECREF(whom_);
    whom_ = whom;
    on_cpu_ = on_cpu;
    answers_ = {};
  }

  // Whether the kernels called `backend` of op number `op` are right for tensors like t and rows of `size`. The size
  // decides how they are launched: all sizes between two powers of two share one answer. False while nobody can be
  // asked.
  bool right(size_t op, const char* name, const char* backend, const Tensor& t, int64_t size) {
    if (t.is_cpu() ? !on_cpu_ : !t.is_cuda()) return true;
    if (!whom_ || asking()) return true;
    const char* dtype = t.scalar_type() == at::kFloat      ? "float32"
                        : t.scalar_type() == at::kBFloat16 ? "bfloat16"
                        : t.scalar_type() == at::kHalf     ? "float16"
                                                           : nullptr;
    if (!dtype) return true;  // there is no such kernel
    const int device = t.is_cpu() ? -1 : t.device().index(),
              log = std::min<int>(std::bit_width(uint64_t(std::max<int64_t>(size, 1) - 1)), kLongest);
    auto& known = answers_[op][device & 63][dtype[0] == 'b' ? 0 : dtype[5] == '1' ? 1 : 2][backend[0] == 't'];
    const uint32_t bit = uint32_t(1) << log;
    if (known.right & bit) return true;
    if (known.wrong & bit || !ordinary_thread()) return false;
    PyObject* said = PyObject_CallFunction(whom_, "ssisL", name, backend, device, dtype, (long long)1 << log);
    if (!said) throw python_error();
    const bool right = said == Py_True;
    if (said != Py_None) (right ? known.right : known.wrong) |= bit;
    Py_DECREF(said);
    return right;
  }

  // Whether this thread runs the comparison: every kernel is then open to it.
  static bool& asking() {
    static thread_local bool is = false;
    return is;
  }

 private:
  static constexpr int kLongest = 17;  // longer rows are launched as these
  struct Answer {
    uint32_t right = 0, wrong = 0;  // a bit for each power of two
  };
  PyObject* whom_ = nullptr;
  bool on_cpu_ = false;
  std::array<std::array<std::array<std::array<Answer, 2>, 3>, 64>, kMostOps> answers_;
};

}  // namespace nnfast
