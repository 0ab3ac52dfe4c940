// The gate's own state, and what it reads of a Python argument.
#pragma once

#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <utility>

#include "../cpu/cpu.h"
#include "../ops/op.h"
#include "answers.h"

namespace nnfast {

inline PyObject* interned(const char* s) { return PyUnicode_InternFromString(s); }

enum class Backend { torch, cpu, cuda, triton };

constexpr std::pair<const char*, Backend> kBackends[] = {
    {"torch", Backend::torch}, {"cpu", Backend::cpu}, {"cuda", Backend::cuda}, {"triton", Backend::triton}};

inline std::optional<Backend> backend_called(const char* name) {
  for (const auto& [known, backend] : kBackends)
    if (name && std::strcmp(name, known) == 0) return backend;
  return std::nullopt;
}

// What use_backend() holds this thread to, or NNFAST_BACKEND, as it is when this is loaded, every thread.
inline const std::optional<Backend> held_at_first = backend_called(std::getenv("NNFAST_BACKEND"));
inline thread_local std::optional<Backend> held = held_at_first;

constexpr std::array kOps = {
    "layer_norm",
    "gelu",
    "linear",
    "linear_gelu",
    "cross_entropy",
    "linear_cross_entropy",
    "adamw_",
    "sgd_",
    "rmsprop_",
    "total_norm",
    "scaled_dot_product_attention",
    "embedding"};
static_assert(kOps.size() <= KnownAnswers::kMostOps);

using Op = size_t;  // where it stands in kOps
consteval Op op_called(std::string_view name) {
  for (Op op = 0; op < kOps.size(); ++op)
    if (name == kOps[op]) return op;
  throw "no such op";  // does not compile
}

// Whose kernels the dispatcher holds at the CUDA key. in_cpp: ours in C++, known when this module is loaded; on_gpu:
// the same, or Triton's once Python has registered them and said so.
inline std::array<Backend, kOps.size()> in_cpp, on_gpu;

inline KnownAnswers known_answers;

// `size`: of a row of t, where that decides how the kernel is launched.
inline bool served(Op op, const Tensor& t, int64_t size = 1) {
  auto owner = !t.is_cpu() ? on_gpu[op] : cpu_kernels() ? Backend::cpu : Backend::torch;
  if (owner == Backend::cuda && t.is_cuda() && cuda_kernels_load && !cuda_kernels_load(t.device().index()))
    owner = Backend::torch;
  if (owner == Backend::torch || held) return owner != Backend::torch && owner == *held;
  return known_answers.right(op, kOps[op], kBackends[static_cast<size_t>(owner)].first, t, size);
}

// A tensor of exactly torch's type, or None.
inline bool is_plain(PyObject* o) { return THPVariable_CheckExact(o); }
inline bool is_plain_or_none(PyObject* o) { return o == Py_None || is_plain(o); }
inline OptTensor optional_tensor(PyObject* o) { return o == Py_None ? OptTensor() : OptTensor(THPVariable_Unpack(o)); }

inline bool unpack_string(PyObject* o, c10::string_view& out) {
  Py_ssize_t size;
  const char* s = PyUnicode_Check(o) ? PyUnicode_AsUTF8AndSize(o, &size) : nullptr;
  if (!s) return PyErr_Clear(), false;
  out = {s, (size_t)size};
  return true;
}

inline bool unpack_int(PyObject* o, int64_t& out) {
  if (!PyLong_CheckExact(o)) return false;
  out = PyLong_AsLongLong(o);
  return PyErr_Occurred() ? (PyErr_Clear(), false) : true;
}

// A float, or an int of 64 bits. Bools and longer ints are left to torch, which refuses them in places.
inline bool unpack_double(PyObject* o, double& out) {
  if (PyFloat_Check(o)) return out = PyFloat_AS_DOUBLE(o), true;
  int64_t whole;
  if (!unpack_int(o, whole)) return false;
  out = static_cast<double>(whole);
  return true;
}

// A tuple or list of ints; a single int is none, as to torch's own parser.
inline bool unpack_sizes(PyObject* o, at::DimVector& out) {
  if (!PyTuple_Check(o) && !PyList_Check(o)) return false;
  for (Py_ssize_t i = 0, n = PySequence_Fast_GET_SIZE(o); i < n; ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(o, i);
    if (!PyLong_CheckExact(item)) return false;
    out.push_back(PyLong_AsLongLong(item));
    if (PyErr_Occurred()) return PyErr_Clear(), false;
  }
  return true;
}

}  // namespace nnfast
