// The extension module nnfast._C_<torch's minor version>: the gate, and behind it a short way from Python to the ops.
//
// The ops' functions give the result, or None where the call is torch's. A plain C function costs about a microsecond
// less a call than torch.ops, which parses a schema.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Reduction.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <limits>

#include "../cpu/memory.h"
#include "../ops/paths.h"
#include "gate.h"
#include "optimizer.h"

namespace nnfast {

// Whether forward-mode AD is at work. Asking a tensor for its tangent takes a lock; this asks for the current level,
// without which no tensor has one.
static bool has_dual_level() {
  static PyObject* const names = []() -> PyObject* {
    PyObject* module = PyImport_ImportModule("torch.autograd.forward_ad");
    if (!module) throw python_error();
    return PyModule_GetDict(module);
  }();
  PyObject* level = PyDict_GetItem(names, NNFAST_KEY("_current_level"));
  return !level || !PyLong_Check(level) || PyLong_AsLong(level) >= 0;
}

bool ordinary_thread() { return plain_thread() && !at::impl::torch_function_mode_enabled() && !has_dual_level(); }

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

// Whether this is plain eager execution on plain tensors, and a kernel of ours serves the op where they are; `size` as
// KnownAnswers takes it.
template <class... T>
bool open_to(Op op, int64_t size, const Tensor& first, const T&... others) {
  return ordinary_thread() && served(op, first, size) && ordinary(first) && (ordinary(others) && ...);
}

// What call() gives, while other Python threads may run.
template <class F>
PyObject* output_of(F call) {
  Tensor output;
  {
    pybind11::gil_scoped_release no_gil;
    output = call();
  }
  return THPVariable_Wrap(std::move(output));
}

// ---- what torch does sooner; who asks for ours explicitly gets it (`held`) ----

// GELU of doubles is ATen's in any case, and torch's node takes some microseconds less.
bool torch_activates_sooner(const Tensor& input) {
  return !held && input.is_cpu() && input.scalar_type() == at::kDouble;
}

// With AVX-512, 16 classes in float32, a register a row: torch's loss took 0.9 of our time. Measured before few
// classes had kernels of their own (cross_entropy_few), and not since.
bool torch_takes_the_loss_sooner(const Tensor& input) {
  return !held && input.scalar_type() == at::kFloat && input.dim() == 2 && input.size(1) == 16 && input.is_cpu() &&
         cpu_kernels()->avx512;
}

// One or two queries, as a model that generates has them, fill few lanes of ours: forward, in float32, 0.7 to 1.0 times
// as fast as torch. With the backward ours gains, and 16 bits gain in any case.
bool torch_attends_sooner(const Tensor& query, const Tensor& key, const Tensor& value) {
  return !held && query.is_cpu() && query.scalar_type() == at::kFloat && query.size(2) <= 2 && key.size(2) > 32 &&
         !any_needs_grad(query, key, value) && !at::autocast::is_autocast_enabled(at::kCPU);
}

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
  const int64_t size = c10::multiply_integers(shape);
  if (!open_to(op_called("layer_norm"), size, input, weight, bias) || !covers_layer_norm(input, shape, weight, bias))
    Py_RETURN_NONE;
  return output_of([&] { return std::get<0>(layer_norm(input, c10::fromIntArrayRefSlow(shape), weight, bias, eps)); });
  END_HANDLE_TH_ERRORS
}

PyObject* py_gelu(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 2) return wrong_arguments("gelu(input, approximate)");
  c10::string_view approximate;
  if (!is_plain(args[0]) || !unpack_string(args[1], approximate)) Py_RETURN_NONE;
  const Tensor& input = THPVariable_Unpack(args[0]);
  if (!open_to(op_called("gelu"), 1, input) || !covers_gelu(input, approximate) || torch_activates_sooner(input))
    Py_RETURN_NONE;
  return output_of([&] { return nnfast::gelu(input, approximate); });
  END_HANDLE_TH_ERRORS
}

// On a GPU a Linear's products are torch's in any case. What it gains by us is in 16 bits and in the backward, which
// does that of a GELU before it as well.
bool gains(const Tensor& input, const Tensor& weight, const OptTensor& bias) {
  if (!input.is_cuda() || held) return true;
  const auto device = input.device().type();
  const bool cast = at::autocast::is_autocast_enabled(device);
  return any_needs_grad(input, weight, bias) &&
         at::isReducedFloatingType(cast ? at::autocast::get_autocast_dtype(device) : input.scalar_type());
}

PyObject* py_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 3) return wrong_arguments("linear(input, weight, bias)");
  if (!is_plain(args[0]) || !is_plain(args[1]) || !is_plain_or_none(args[2])) Py_RETURN_NONE;
  const Tensor &input = THPVariable_Unpack(args[0]), &weight = THPVariable_Unpack(args[1]);
  const OptTensor bias = optional_tensor(args[2]);
  if (!gains(input, weight, bias) || !open_to(op_called("linear"), 1, input, weight, bias) ||
      !covers_linear(input, weight, bias))
    Py_RETURN_NONE;
  return output_of([&] { return nnfast::linear(input, weight, bias); });
  END_HANDLE_TH_ERRORS
}

PyObject* py_linear_gelu(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 4) return wrong_arguments("linear_gelu(input, weight, bias, approximate)");
  c10::string_view approximate;
  if (!is_plain(args[0]) || !is_plain(args[1]) || !is_plain_or_none(args[2]) || !unpack_string(args[3], approximate))
    Py_RETURN_NONE;
  const Tensor &input = THPVariable_Unpack(args[0]), &weight = THPVariable_Unpack(args[1]);
  const OptTensor bias = optional_tensor(args[2]);
  if (!open_to(op_called("linear_gelu"), 1, input, weight, bias) ||
      !covers_linear_gelu(input, weight, bias, approximate))
    Py_RETURN_NONE;
  return output_of([&] { return std::get<0>(linear_gelu(input, weight, bias, approximate, /*want_pre=*/false)); });
  END_HANDLE_TH_ERRORS
}

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
  if (!open_to(op_called("cross_entropy"), 1, input, target, weight) ||
      !covers_cross_entropy(input, target, weight, ignore_index, label_smoothing) || torch_takes_the_loss_sooner(input))
    Py_RETURN_NONE;
  return output_of(
      [&] { return std::get<0>(cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing)); });
  END_HANDLE_TH_ERRORS
}

// embedding(indices, weight, padding_idx or None, scale_grad_by_freq)
PyObject* py_embedding(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 4) return wrong_arguments("embedding(indices, weight, padding_idx, scale_grad_by_freq)");
  int64_t padding_idx = -1;
  if (!is_plain(args[0]) || !is_plain(args[1]) || !PyBool_Check(args[3]) ||
      (args[2] != Py_None && !unpack_int(args[2], padding_idx)))
    Py_RETURN_NONE;
  const Tensor &indices = THPVariable_Unpack(args[0]), &weight = THPVariable_Unpack(args[1]);
  if (args[2] != Py_None && padding_idx < 0 && weight.dim() > 0) padding_idx += weight.size(0);
  if (!open_to(op_called("embedding"), 1, weight, indices) || !covers_embedding(weight, indices, padding_idx) ||
      (args[2] != Py_None && padding_idx < 0))
    Py_RETURN_NONE;
  return output_of([&] { return nnfast::embedding(weight, indices, padding_idx, args[3] == Py_True); });
  END_HANDLE_TH_ERRORS
}

PyObject* py_attention(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 7)
    return wrong_arguments("scaled_dot_product_attention(query, key, value, attn_mask, is_causal, scale, enable_gqa)");
  std::optional<double> scale;
  if (double given = 0; args[5] != Py_None) {
    if (!unpack_double(args[5], given)) Py_RETURN_NONE;
    scale = given;
  }
  if (!is_plain(args[0]) || !is_plain(args[1]) || !is_plain(args[2]) || !is_plain_or_none(args[3]) ||
      !PyBool_Check(args[4]) || !PyBool_Check(args[6]))
    Py_RETURN_NONE;
  const bool is_causal = args[4] == Py_True;
  const Tensor &query = THPVariable_Unpack(args[0]), &key = THPVariable_Unpack(args[1]),
               &value = THPVariable_Unpack(args[2]);
  const OptTensor mask = optional_tensor(args[3]);
  if (!open_to(op_called("scaled_dot_product_attention"), 1, query, key, value, mask) ||
      !covers_attention(query, key, value, mask, is_causal) || torch_attends_sooner(query, key, value) ||
      !allowed_attention(query, key, value, mask) || (query.size(1) != key.size(1) && args[6] != Py_True))
    Py_RETURN_NONE;
  return output_of(
      [&] { return std::get<0>(scaled_dot_product_attention(query, key, value, mask, is_causal, scale)); });
  END_HANDLE_TH_ERRORS
}

PyObject* py_linear_cross_entropy(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 8)
    return wrong_arguments(
        "linear_cross_entropy(input, linear_weight, target, linear_bias, weight, ignore_index, reduction, "
        "label_smoothing)");
  int64_t ignore_index, reduction;
  double label_smoothing;
  if (!is_plain(args[0]) || !is_plain(args[1]) || !is_plain(args[2]) || !is_plain_or_none(args[3]) ||
      !is_plain_or_none(args[4]) || !unpack_int(args[5], ignore_index) || !unpack_reduction(args[6], reduction) ||
      !unpack_double(args[7], label_smoothing))
    Py_RETURN_NONE;
  const Tensor &input = THPVariable_Unpack(args[0]), &linear_weight = THPVariable_Unpack(args[1]);
  const Tensor& target = THPVariable_Unpack(args[2]);
  const OptTensor linear_bias = optional_tensor(args[3]), weight = optional_tensor(args[4]);
  if (!open_to(op_called("linear_cross_entropy"), 1, input, linear_weight, target, linear_bias, weight) ||
      !covers_linear_cross_entropy(input, linear_weight, target, linear_bias, weight, ignore_index, label_smoothing))
    Py_RETURN_NONE;
  return output_of([&] {
    return std::get<0>(linear_cross_entropy(
        input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing));
  });
  END_HANDLE_TH_ERRORS
}

// From so many elements on a call takes a millisecond, and other Python threads may run meanwhile. References then
// hold the tensors, which those threads could let go of: `hold` makes them.
Threshold release_gil("release_gil_elements", int64_t(1) << 20);
Path gil_released("without_gil");
template <class Hold, class Call>
auto run(int64_t elements, Hold hold, Call call) {
  if (elements < release_gil) return call();
  gil_released.taken();
  const auto kept = hold();
  const pybind11::gil_scoped_release no_gil;
  return call();
}

// adamw_(param_groups, state, grad_scale, found_inf, clip_coef, master_weights, rounding_seed, skipped), and sgd_ and
// rmsprop_: True where all is done, but for the parameters in the set `skipped`, or None. Else nothing is done: False
// where nothing is ours, or a list of the parameters that are torch's, group by group.
template <class Call>
PyObject* py_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 8)
    return wrong_arguments(
        "(param_groups, state, grad_scale, found_inf, clip_coef, master_weights, rounding_seed, skipped)");
  if (!ordinary_thread() || !PyList_Check(args[0]) || !PyDict_Check(args[1]) || !is_plain_or_none(args[2]) ||
      !is_plain_or_none(args[3]) || !is_plain_or_none(args[4]))
    Py_RETURN_FALSE;
  const bool exact = args[5] == Py_True;
  PyObject* skipped = PySet_Check(args[7]) ? args[7] : nullptr;
  // Every group is read before any is changed.
  std::vector<Group<Call>> groups(PyList_GET_SIZE(args[0]));
  StateReader states(args[1]);
  bool all = true;
  int64_t seed = 0;
  if (args[6] != Py_None && !unpack_int(args[6], seed)) return wrong_arguments("rounding_seed is an int or None");
  for (size_t i = 0; i < groups.size(); ++i) {
    auto& call = groups[i].call;
    call.grad_scale = optional_tensor(args[2]);
    call.found_inf = optional_tensor(args[3]);
    call.clip_coef = optional_tensor(args[4]);
    // Another one for each group, in which tensors are counted from 0.
    if (args[6] != Py_None)
      call.rounding_seed = static_cast<int64_t>(static_cast<uint64_t>(seed) + (uint64_t(i) << 32));
    if (!read_group(PyList_GET_ITEM(args[0], i), states, exact, skipped, groups[i])) Py_RETURN_FALSE;
    all = all && groups[i].left.empty();
  }
  if (!all) {
    py::list left;
    for (const auto& g : groups) {
      py::list of_group;
      for (PyObject* p : g.left) of_group.append(py::handle(p));
      left.append(of_group);
    }
    return left.release().ptr();
  }
  int64_t elements = 0;
  for (const auto& g : groups) elements += g.elements;
  const auto hold = [&] {
    std::vector<std::vector<Tensor>> kept;
    for (const auto& g : groups) kept.push_back(g.held());
    return kept;
  };
  run(elements, hold, [&] {
    for (auto& g : groups) g.step();
  });
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

// Plain dense tensors on one device, as the functions below take them.
bool read_tensors(PyObject* list, Borrowed& out) {
  if (!PyList_Check(list) || !PyList_GET_SIZE(list) || !ordinary_thread()) return false;
  out.reserve(PyList_GET_SIZE(list));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    PyObject* o = PyList_GET_ITEM(list, i);
    if (!is_plain(o)) return false;
    const Tensor& t = THPVariable_Unpack(o);
    if (!served(op_called("total_norm"), t) || !ordinary(t) || !covers_clip(t)) return false;
    if (i && t.device() != out.tensors()[0].device()) return false;
    out.add(t);
  }
  return true;
}

// call(tensors), for which the lock is given back where it takes long.
template <class Call>
auto run(const Borrowed& borrowed, Call call) {
  const auto& tensors = borrowed.tensors();
  int64_t elements = 0;
  for (const auto& t : tensors) elements += t.numel();
  return run(elements, [&] { return std::vector<Tensor>(tensors); }, [&] { return call(tensors); });
}

// total_norm(tensors, norm_type): their norm in the dtype that all of them fit in, and in float64; or None where it is
// torch's.
PyObject* py_total_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  double norm_type;
  if (count != 2 || !unpack_double(args[1], norm_type)) return wrong_arguments("total_norm(tensors, norm_type)");
  Borrowed tensors;
  const bool largest = norm_type == std::numeric_limits<double>::infinity();
  if ((norm_type != 2 && !largest) || !read_tensors(args[0], tensors)) Py_RETURN_NONE;
  const auto& all = tensors.tensors();
  const auto is_empty = [](const Tensor& t) { return t.numel() == 0; };  // the largest of nothing is torch's error
  if (largest && (!all[0].is_cpu() || std::any_of(all.begin(), all.end(), is_empty))) Py_RETURN_NONE;
  const auto dtype = norm_dtype(all);  // before other threads may let go of the tensors
  const Tensor exact = run(tensors, [&](const auto& t) { return total_norm(t, norm_type); });
  return py::make_tuple(exact.to(dtype), exact).release().ptr();
  END_HANDLE_TH_ERRORS
}

// scale_(tensors, factor): False where it is torch's.
PyObject* py_scale_(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  double factor;
  if (count != 2 || !unpack_double(args[1], factor)) return wrong_arguments("scale_(tensors, factor)");
  Borrowed tensors;
  if (!read_tensors(args[0], tensors) || !tensors.tensors()[0].is_cpu()) Py_RETURN_FALSE;
  run(tensors, [&](const auto& t) { scale_(t, factor); });
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

// clip_coef(tensors, max_norm, grad_scale or None, scales): their norm and what they are to be multiplied by, on a GPU;
// and with `scales`, they are. None where it is torch's.
PyObject* py_clip_coef(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  double max_norm;
  if (count != 4) return wrong_arguments("clip_coef(tensors, max_norm, grad_scale, scales)");
  Borrowed tensors;
  if (!unpack_double(args[1], max_norm) || !is_plain_or_none(args[2]) || !read_tensors(args[0], tensors) ||
      tensors.tensors()[0].is_cpu() ||
      (args[2] != Py_None && THPVariable_Unpack(args[2]).device() != tensors.tensors()[0].device()))
    Py_RETURN_NONE;
  const auto [norm, coef] = clip_coef(tensors.tensors(), max_norm, optional_tensor(args[2]));
  if (args[3] == Py_True) scale_by_(tensors.tensors(), coef);
  return Py_BuildValue("NN", THPVariable_Wrap(norm), THPVariable_Wrap(coef));
  END_HANDLE_TH_ERRORS
}

// known_answers(function or None, on_cpu): function(op, backend, device, dtype, size) -> whether those kernels are
// right, or None where that cannot be asked now.
PyObject* py_known_answers(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 2) return wrong_arguments("known_answers(function, on_cpu)");
  known_answers.ask(args[0] == Py_None ? nullptr : args[0], args[1] == Py_True);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// asking(yes): says whether this thread runs the comparison that known_answers asks for.
PyObject* py_asking(PyObject*, PyObject* yes) {
  KnownAnswers::asking() = yes == Py_True;
  Py_RETURN_NONE;
}

// hold(name or None): what this thread is held to.
PyObject* py_hold(PyObject*, PyObject* name) {
  const char* const wanted = name == Py_None ? nullptr : PyUnicode_AsUTF8(name);
  if (PyErr_Occurred()) return nullptr;
  held = backend_called(wanted);
  Py_RETURN_NONE;
}

// ops() -> those that pass the gate
PyObject* py_ops(PyObject*, PyObject*) {
  HANDLE_TH_ERRORS
  return py::cast(std::vector<std::string>(kOps.begin(), kOps.end())).release().ptr();
  END_HANDLE_TH_ERRORS
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

// cpu_kernels() -> "avx512_bf16", "avx512", "avx2" or None
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
      const auto value = PyLong_AsLongLong(args[1]);
      if (PyErr_Occurred()) return nullptr;
      t->value = value;
      Py_RETURN_NONE;
    }
  PyErr_SetObject(PyExc_KeyError, args[0]);
  return nullptr;
  END_HANDLE_TH_ERRORS
}

// memory() -> (live, kept): bytes of large CPU outputs in use, and kept for the next.
PyObject* py_memory(PyObject*, PyObject*) {
  HANDLE_TH_ERRORS
  const auto use = memory_use();
  return Py_BuildValue("LL", (long long)use.live, (long long)use.kept);
  END_HANDLE_TH_ERRORS
}

PyObject* py_empty_cache(PyObject*, PyObject*) {
  HANDLE_TH_ERRORS
  empty_cache();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// fail_allocation(n) -> how many were still to go before the failure asked for last: for tests alone.
PyObject* py_fail_allocation(PyObject*, PyObject* n) {
  HANDLE_TH_ERRORS
  const auto count = PyLong_AsLongLong(n);
  return PyErr_Occurred() ? nullptr : PyLong_FromLongLong(fail_allocation(count));
  END_HANDLE_TH_ERRORS
}

#define FAST(name, function) {name, (PyCFunction)(void (*)(void))function, METH_FASTCALL, nullptr}
PyMethodDef methods[] = {
    FAST("layer_norm", py_layer_norm),
    FAST("gelu", py_gelu),
    FAST("linear", py_linear),
    FAST("linear_gelu", py_linear_gelu),
    FAST("cross_entropy", py_cross_entropy),
    FAST("linear_cross_entropy", py_linear_cross_entropy),
    FAST("embedding", py_embedding),
    FAST("scaled_dot_product_attention", py_attention),
    FAST("adamw_", py_step<AdamWCall>),
    FAST("sgd_", py_step<SgdCall>),
    FAST("rmsprop_", py_step<RMSpropCall>),
    FAST("total_norm", py_total_norm),
    FAST("scale_", py_scale_),
    FAST("clip_coef", py_clip_coef),
    FAST("set_threshold", py_set_threshold),
    FAST("known_answers", py_known_answers),
    {"asking", py_asking, METH_O, nullptr},
    {"hold", py_hold, METH_O, nullptr},
    {"memory", py_memory, METH_NOARGS, nullptr},
    {"empty_cache", py_empty_cache, METH_NOARGS, nullptr},
    {"fail_allocation", py_fail_allocation, METH_O, nullptr},
    {"paths", py_paths, METH_NOARGS, nullptr},
    {"thresholds", py_thresholds, METH_NOARGS, nullptr},
    {"cpu_kernels", py_cpu_kernels, METH_NOARGS, nullptr},
    {"ops", py_ops, METH_NOARGS, nullptr},
    {"cuda_kernels", py_cuda_kernels, METH_NOARGS, nullptr},
    {"triton_kernels", py_triton_kernels, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace nnfast

// setup.py names it after the file: PyInit__C_2_13.
PyMODINIT_FUNC NNFAST_INIT() {
  using namespace nnfast;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (size_t op = 0; op < kOps.size(); ++op) {
    // Of a Linear on a GPU, gelu_linear_backward is all that is ours: where it has a kernel, the Linear is served.
    const auto name = std::string("nnfast::") + (op == op_called("linear") ? "gelu_linear_backward" : kOps[op]);
    const auto handle = dispatcher.findSchemaOrThrow(name.c_str(), "");
    const bool there = handle.hasKernelForDispatchKey(c10::DispatchKey::CUDA);
    on_gpu[op] = in_cpp[op] = there ? Backend::cuda : Backend::torch;
  }
  PyObject* const m = PyModule_Create(&module);
  if (!m) return nullptr;
  PyModule_AddStringConstant(m, "built_for", TORCH_VERSION);
  return m;
}
