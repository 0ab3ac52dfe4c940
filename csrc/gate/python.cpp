// The extension module nnfast._C: the gate, and behind it a short way from Python to the ops.
//
// layer_norm, gelu, linear, linear_gelu, linear_gelu_pre, cross_entropy: the result, or None where the call is torch's.
// adamw_: True, or False where nothing was done and the step is torch's.
// A plain C function costs about a microsecond less a call than torch.ops, which parses a schema.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Reduction.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "gate.h"
#include "optimizer.h"
#include "paths.h"

namespace nnfast {

// Subtracting key sets leaves the backend bits alone, so the bits themselves are compared.
static bool within(c10::DispatchKeySet keys, c10::DispatchKeySet allowed) {
  return (keys.raw_repr() & ~allowed.raw_repr()) == 0;
}

// Whether forward-mode AD is at work. Asking a tensor for its tangent takes a lock; this asks for the current level,
// without which no tensor has one.
static bool has_dual_level() {
  static PyObject* const key = interned("_current_level");
  static PyObject* const names = []() -> PyObject* {
    PyObject* module = PyImport_ImportModule("torch.autograd.forward_ad");
    if (!module) throw python_error();
    return PyModule_GetDict(module);
  }();
  PyObject* level = PyDict_GetItem(names, key);
  return !level || !PyLong_Check(level) || PyLong_AsLong(level) >= 0;
}

bool ordinary_thread() {
  // What a thread includes beyond the defaults is a transform, a mode or a tracer.
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return within(included, c10::default_included_set) && !at::impl::torch_function_mode_enabled() && !has_dual_level();
}

bool ordinary(const Tensor& t) {
  static const c10::DispatchKeySet plain = c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::CUDA}) |
                                           c10::autocast_dispatch_keyset |
                                           c10::autograd_dispatch_keyset_with_ADInplaceOrView;
  return within(t.key_set(), plain);
}

namespace {

PyObject* wrong_arguments(const char* signature) {
  PyErr_SetString(PyExc_TypeError, signature);
  return nullptr;
}

bool unpack_reduction(PyObject* o, int64_t& out) {
  c10::string_view name;
  if (!unpack_string(o, name)) return false;
  out = name == "none" ? at::Reduction::None : name == "mean" ? at::Reduction::Mean : at::Reduction::Sum;
  return name == "none" || name == "mean" || name == "sum";
}

// layer_norm(input, normalized_shape, weight, bias, eps)
PyObject* py_layer_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 5) return wrong_arguments("layer_norm(input, normalized_shape, weight, bias, eps)");
  at::DimVector shape;
  double eps;
  if (!is_plain(args[0]) || !is_plain_or_none(args[2]) || !is_plain_or_none(args[3]) || !unpack_sizes(args[1], shape) ||
      !unpack_double(args[4], eps))
    Py_RETURN_NONE;
  const Tensor& input = THPVariable_Unpack(args[0]);
  const OptTensor weight = optional_tensor(args[2]), bias = optional_tensor(args[3]);
  if (!open(kLayerNorm, input) || !ordinary(input) || !ordinary(weight) || !ordinary(bias) ||
      !covers_layer_norm(input, shape, weight, bias))
    Py_RETURN_NONE;
  Tensor output;
  {
    pybind11::gil_scoped_release no_gil;
    output = std::get<0>(layer_norm(input, c10::fromIntArrayRefSlow(shape), weight, bias, eps));
  }
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

// gelu(input, approximate)
PyObject* py_gelu(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 2) return wrong_arguments("gelu(input, approximate)");
  c10::string_view approximate;
  if (!is_plain(args[0]) || !unpack_string(args[1], approximate)) Py_RETURN_NONE;
  const Tensor& input = THPVariable_Unpack(args[0]);
  if (!open(kGelu, input) || !ordinary(input) || !covers_gelu(input, approximate)) Py_RETURN_NONE;
  Tensor output;
  {
    pybind11::gil_scoped_release no_gil;
    output = nnfast::gelu(input, approximate);
  }
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

// linear(input, weight, bias)
PyObject* py_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 3) return wrong_arguments("linear(input, weight, bias)");
  if (!is_plain(args[0]) || !is_plain(args[1]) || !is_plain_or_none(args[2])) Py_RETURN_NONE;
  const Tensor &input = THPVariable_Unpack(args[0]), &weight = THPVariable_Unpack(args[1]);
  const OptTensor bias = optional_tensor(args[2]);
  if (!open(kLinear, input) || !ordinary(input) || !ordinary(weight) || !ordinary(bias) ||
      !covers_linear(input, weight, bias))
    Py_RETURN_NONE;
  Tensor output;
  {
    pybind11::gil_scoped_release no_gil;
    output = nnfast::linear(input, weight, bias);
  }
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

// linear_gelu(input, weight, bias, approximate), and linear_gelu_pre with the same arguments: (output, pre).
template <bool WithPre>
PyObject* py_linear_gelu(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 4) return wrong_arguments("linear_gelu(input, weight, bias, approximate)");
  c10::string_view approximate;
  if (!is_plain(args[0]) || !is_plain(args[1]) || !is_plain_or_none(args[2]) || !unpack_string(args[3], approximate))
    Py_RETURN_NONE;
  const Tensor &input = THPVariable_Unpack(args[0]), &weight = THPVariable_Unpack(args[1]);
  const OptTensor bias = optional_tensor(args[2]);
  if (!open(kLinearGelu, input) || !ordinary(input) || !ordinary(weight) || !ordinary(bias) ||
      !covers_linear_gelu(input, weight, bias, approximate))
    Py_RETURN_NONE;
  Tensor output, pre;
  {
    pybind11::gil_scoped_release no_gil;
    std::tie(output, pre) = linear_gelu(input, weight, bias, approximate);
  }
  if constexpr (!WithPre) return THPVariable_Wrap(std::move(output));
  THPObjectPtr first(THPVariable_Wrap(std::move(output))), second(THPVariable_Wrap(std::move(pre)));
  return first && second ? PyTuple_Pack(2, first.get(), second.get()) : nullptr;
  END_HANDLE_TH_ERRORS
}

// cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
PyObject* py_cross_entropy(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 6)
    return wrong_arguments("cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)");
  int64_t ignore_index, reduction;
  double label_smoothing;
  if (!is_plain(args[0]) || !is_plain(args[1]) || !is_plain_or_none(args[2]) || !unpack_int(args[3], ignore_index) ||
      !unpack_reduction(args[4], reduction) || !unpack_double(args[5], label_smoothing))
    Py_RETURN_NONE;
  const Tensor &input = THPVariable_Unpack(args[0]), &target = THPVariable_Unpack(args[1]);
  const OptTensor weight = optional_tensor(args[2]);
  if (!open(kCrossEntropy, input) || !ordinary(input) || !ordinary(target) || !ordinary(weight) ||
      !covers_cross_entropy(input, target, weight, ignore_index, label_smoothing))
    Py_RETURN_NONE;
  Tensor output;
  {
    pybind11::gil_scoped_release no_gil;
    output = std::get<0>(cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing));
  }
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

// Elements from which other Python threads may run during a step, some milliseconds. What they could let go of is then
// held by references.
Threshold release_gil("release_gil_elements", int64_t(1) << 24);
Path gil_released("adamw_.without_gil");

// adamw_(param_groups, state, grad_scale, found_inf)
PyObject* py_adamw_(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 4) return wrong_arguments("adamw_(param_groups, state, grad_scale, found_inf)");
  if (!ordinary_thread() || !PyList_Check(args[0]) || !PyDict_Check(args[1]) || !is_plain_or_none(args[2]) ||
      !is_plain_or_none(args[3]))
    Py_RETURN_FALSE;
  const OptTensor grad_scale = optional_tensor(args[2]), found_inf = optional_tensor(args[3]);
  // Every group is read before any is changed.
  std::vector<AdamWGroup> groups(PyList_GET_SIZE(args[0]));
  StateReader state(args[1]);
  for (size_t i = 0; i < groups.size(); ++i)
    if (!read_group(PyList_GET_ITEM(args[0], i), state, groups[i]) || !groups[i].on_one_device(grad_scale, found_inf))
      Py_RETURN_FALSE;
  for (const auto& g : groups) {
    if (g.elements < release_gil) {
      g.step(grad_scale, found_inf);
      continue;
    }
    gil_released.taken();
    std::vector<Tensor> held;
    for (const auto* list :
         {&g.params, &g.grads, &g.exp_avgs, &g.exp_avg_sqs, &g.max_exp_avg_sqs, &g.state_steps, &g.sharded})
      held.insert(held.end(), list->tensors().begin(), list->tensors().end());
    pybind11::gil_scoped_release no_gil;
    g.step(grad_scale, found_inf);
  }
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

// hold(name or None): what this thread is held to.
PyObject* py_hold(PyObject*, PyObject* name) {
  held = backend_called(name == Py_None ? nullptr : PyUnicode_AsUTF8(name));
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

// cuda_kernels() -> the ops that C++ serves on a GPU
PyObject* py_cuda_kernels(PyObject*, PyObject*) {
  HANDLE_TH_ERRORS
  py::list ops;
  for (size_t op = 0; op < kOps.size(); ++op)
    if (in_cpp[op] == Backend::cuda) ops.append(kOps[op]);
  return ops.release().ptr();
  END_HANDLE_TH_ERRORS
}

// triton_kernels(ops): those that Triton serves on a GPU from now on; the others are C++'s again, or torch's.
PyObject* py_triton_kernels(PyObject*, PyObject* ops) {
  HANDLE_TH_ERRORS
  on_gpu = in_cpp;
  for (size_t op = 0; op < kOps.size(); ++op)
    if (py::handle(ops).contains(kOps[op])) on_gpu[op] = Backend::triton;
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// cpu_kernels() -> "avx512", "avx2" or None
PyObject* py_cpu_kernels(PyObject*, PyObject*) {
  HANDLE_TH_ERRORS
  if (!cpu_kernels()) Py_RETURN_NONE;
  return PyUnicode_FromString(cpu_kernels()->name);
  END_HANDLE_TH_ERRORS
}

// paths() -> {name: how many calls took it}
PyObject* py_paths(PyObject*, PyObject*) {
  HANDLE_TH_ERRORS
  py::dict counts;
  for (auto* path = Path::first(); path; path = path->next()) counts[path->name] = path->count.load();
  return counts.release().ptr();
  END_HANDLE_TH_ERRORS
}

// thresholds() -> {name: value}
PyObject* py_thresholds(PyObject*, PyObject*) {
  HANDLE_TH_ERRORS
  py::dict values;
  for (auto* t = Threshold::first(); t; t = t->next()) values[t->name] = t->value.load();
  return values.release().ptr();
  END_HANDLE_TH_ERRORS
}

// set_threshold(name, value): for tests alone.
PyObject* py_set_threshold(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  c10::string_view name;
  if (count != 2 || !unpack_string(args[0], name) || !PyLong_Check(args[1]))
    return wrong_arguments("set_threshold(name, value)");
  for (auto* t = Threshold::first(); t; t = t->next())
    if (name == t->name) {
      t->value = PyLong_AsLongLong(args[1]);
      if (PyErr_Occurred()) return nullptr;
      Py_RETURN_NONE;
    }
  PyErr_SetObject(PyExc_KeyError, args[0]);
  return nullptr;
  END_HANDLE_TH_ERRORS
}

#define FAST(name, function) {name, (PyCFunction)(void (*)(void))function, METH_FASTCALL, nullptr}
PyMethodDef methods[] = {
    FAST("layer_norm", py_layer_norm),
    FAST("gelu", py_gelu),
    FAST("linear", py_linear),
    FAST("linear_gelu", py_linear_gelu<false>),
    FAST("linear_gelu_pre", py_linear_gelu<true>),
    FAST("cross_entropy", py_cross_entropy),
    FAST("adamw_", py_adamw_),
    FAST("set_threshold", py_set_threshold),
    {"hold", py_hold, METH_O, nullptr},
    {"paths", py_paths, METH_NOARGS, nullptr},
    {"thresholds", py_thresholds, METH_NOARGS, nullptr},
    {"cpu_kernels", py_cpu_kernels, METH_NOARGS, nullptr},
    {"cuda_kernels", py_cuda_kernels, METH_NOARGS, nullptr},
    {"triton_kernels", py_triton_kernels, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace nnfast

PyMODINIT_FUNC PyInit__C() {
  using namespace nnfast;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (size_t op = 0; op < kOps.size(); ++op) {
    const auto handle = dispatcher.findSchemaOrThrow((std::string("nnfast::") + kOps[op]).c_str(), "");
    const bool there = handle.hasKernelForDispatchKey(c10::DispatchKey::CUDA);
    on_gpu[op] = in_cpp[op] = there ? Backend::cuda : Backend::torch;
  }
  return PyModule_Create(&module);
}
