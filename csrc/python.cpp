// The extension module nnfast._C: the gate, and behind it a short way from Python to the ops.
//
// layer_norm, gelu, linear_gelu, linear_gelu_pre: the result, or None where the call is torch's.
// adamw_: True, or False where nothing was done and the step is torch's.
// A plain C function costs about a microsecond less a call than torch.ops, which parses a schema.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/cpu.h"
#include "op.h"

namespace nnfast {

// Subtracting key sets leaves the backend bits alone, so the bits themselves are compared.
static bool within(c10::DispatchKeySet keys, c10::DispatchKeySet allowed) {
  return (keys.raw_repr() & ~allowed.raw_repr()) == 0;
}

static PyObject* interned(const char* s) { return PyUnicode_InternFromString(s); }

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

enum class Backend { torch, cpu, cuda, triton };

constexpr std::pair<const char*, Backend> kBackends[] = {
    {"torch", Backend::torch}, {"cpu", Backend::cpu}, {"cuda", Backend::cuda}, {"triton", Backend::triton}};

std::optional<Backend> backend_called(const char* name) {
  for (const auto& [known, backend] : kBackends)
    if (name && std::strcmp(name, known) == 0) return backend;
  return std::nullopt;
}

// What use_backend() holds this thread to, or NNFAST_BACKEND every thread.
thread_local std::optional<Backend> held = backend_called(std::getenv("NNFAST_BACKEND"));

enum Op { kLayerNorm, kGelu, kLinearGelu, kAdamW };
constexpr std::array<const char*, 4> kOps = {"layer_norm", "gelu", "linear_gelu", "adamw_"};

// Whose kernels the dispatcher holds at the CUDA key: ours in C++, known when this module is loaded, or Triton's, which
// Python registers and then says so.
std::array<Backend, 4> in_cpp, on_gpu;

bool served(Op op, const Tensor& t) {
  const auto owner = !t.is_cpu() ? on_gpu[op] : cpu_kernels() ? Backend::cpu : Backend::torch;
  return owner != Backend::torch && owner == held.value_or(owner);
}

bool open(Op op, const Tensor& t) { return served(op, t) && ordinary_thread(); }

// A tensor of exactly torch's type, or None.
bool is_plain(PyObject* o) { return THPVariable_CheckExact(o); }
bool is_plain_or_none(PyObject* o) { return o == Py_None || is_plain(o); }
OptTensor optional_tensor(PyObject* o) { return o == Py_None ? OptTensor() : OptTensor(THPVariable_Unpack(o)); }

bool unpack_string(PyObject* o, c10::string_view& out) {
  Py_ssize_t size;
  const char* s = PyUnicode_Check(o) ? PyUnicode_AsUTF8AndSize(o, &size) : nullptr;
  if (!s) return PyErr_Clear(), false;
  out = {s, (size_t)size};
  return true;
}

bool unpack_double(PyObject* o, double& out) {
  if (!PyFloat_Check(o) && !PyLong_Check(o)) return false;
  out = PyFloat_AsDouble(o);
  if (!PyErr_Occurred()) return true;
  return PyErr_Clear(), false;
}

// A sequence of ints; a single int, as torch's own parser, is not one.
bool unpack_sizes(PyObject* o, at::DimVector& out) {
  if (!PyTuple_Check(o) && !PyList_Check(o)) return false;
  for (Py_ssize_t i = 0, n = PySequence_Fast_GET_SIZE(o); i < n; ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(o, i);
    if (!PyLong_CheckExact(item)) return false;
    out.push_back(PyLong_AsLongLong(item));
    if (PyErr_Occurred()) return PyErr_Clear(), false;
  }
  return true;
}

PyObject* wrong_arguments(const char* signature) {
  PyErr_SetString(PyExc_TypeError, signature);
  return nullptr;
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

// ---- AdamW ----

// Tensors without references of their own. Taking one, and giving it back, costs a tenth of a microsecond: a tensor
// that Python knows counts it there too. What they point to is held by the optimizer, and so alive while nobody else
// runs.
class Borrowed {
 public:
  Borrowed() = default;
  Borrowed(Borrowed&&) = default;
  ~Borrowed() {
    for (auto& t : tensors_) c10::MaybeOwnedTraits<Tensor>::destroyBorrow(t);
  }
  void add(const Tensor& t) { tensors_.push_back(c10::MaybeOwnedTraits<Tensor>::createBorrow(t)); }
  void reserve(size_t n) { tensors_.reserve(n); }
  const std::vector<Tensor>& tensors() const { return tensors_; }

 private:
  std::vector<Tensor> tensors_;
};

struct AdamWGroup {
  Borrowed params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps;
  Borrowed sharded;  // the parameters that are DTensors: of them, params holds the shards
  int64_t elements = 0;
  double lr, beta1, beta2, weight_decay, eps;
  Tensor device_lr;  // in place of lr, where that is a tensor on a GPU
  bool maximize;

  void step(const OptTensor& grad_scale, const OptTensor& found_inf) const {
    if (params.tensors().empty()) return;
    const auto call = [&](auto op, const auto& rate) {
      op(params.tensors(), grads.tensors(), exp_avgs.tensors(), exp_avg_sqs.tensors(), max_exp_avg_sqs.tensors(),
         state_steps.tensors(), rate, beta1, beta2, weight_decay, eps, maximize, grad_scale, found_inf);
    };
    device_lr.defined() ? call(adamw_tensor_lr, device_lr) : call(adamw_, lr);
    for (const auto& t : sharded.tensors()) t.unsafeGetTensorImpl()->bump_version();
  }

  // On one device, with their steps: there, or all on the CPU; and the numbers of a GradScaler with them.
  bool on_one_device(const OptTensor& grad_scale, const OptTensor& found_inf) const {
    if (params.tensors().empty()) return true;
    const auto device = params.tensors()[0].device(), steps = state_steps.tensors()[0].device();
    const auto there = [&](const OptTensor& t) { return !defined(t) || t->device() == device; };
    for (const auto& p : params.tensors())
      if (p.device() != device) return false;
    for (const auto& s : state_steps.tensors())
      if (s.device() != steps) return false;
    return there(grad_scale) && there(found_inf) && (!device_lr.defined() || device_lr.device() == device);
  }
};

// optimizer.state[p] for parameter after parameter. Hashing a tensor is a call into Python; the state was filled in
// the order of the parameters, so the next entry of the dict nearly always is the one.
class StateReader {
 public:
  explicit StateReader(PyObject* state) : state_(state) {}

  // Borrowed, or null where the parameter has no state.
  PyObject* of(PyObject* param) {
    PyObject *key, *value;
    while (!exhausted_) {
      if (!PyDict_Next(state_, &position_, &key, &value)) {
        exhausted_ = true;
        break;
      }
      if (key == param) return PyDict_Check(value) ? value : nullptr;
    }
    value = PyDict_GetItemWithError(state_, param);
    if (!value && PyErr_Occurred()) throw python_error();
    return value && PyDict_Check(value) ? value : nullptr;
  }

 private:
  PyObject* state_;
  Py_ssize_t position_ = 0;
  bool exhausted_ = false;
};

// The values of `keys` in a dict, null for one that is missing. A dict is most quickly read in its own order, which is
// that of the keys wherever torch's optimizer made it.
template <size_t N>
void look_up(PyObject* dict, PyObject* const (&keys)[N], size_t count, PyObject* (&values)[N]) {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (size_t i = 0; i < count; ++i) {
    const bool next = PyDict_Next(dict, &position, &key, &value);
    values[i] = next && key == keys[i] ? value : PyDict_GetItem(dict, keys[i]);
  }
}

bool flag(PyObject* group, PyObject* key, bool& out) {
  PyObject* o = PyDict_GetItem(group, key);
  const int truth = o ? PyObject_IsTrue(o) : -1;
  if (truth < 0) return PyErr_Clear(), false;
  out = truth;
  return true;
}

bool number(PyObject* o, double& out) {
  if (!o) return false;
  if (!is_plain(o)) return unpack_double(o, out);
  const Tensor& t = THPVariable_Unpack(o);
  if (!ordinary(t) || t.numel() != 1) return false;
  out = t.item<double>();
  return true;
}

// A tensor of exactly torch's type DTensor. Where nobody has imported that, there is none.
bool is_dtensor(PyObject* o) {
  static PyObject* const name = interned("torch.distributed.tensor");
  static PyObject* type = nullptr;
  if (!type) {
    THPObjectPtr module(PyImport_GetModule(name));
    if (module) type = PyObject_GetAttrString(module, "DTensor");
    if (!type) return PyErr_Clear(), false;
  }
  return (PyObject*)Py_TYPE(o) == type;
}

// Whether a DTensor holds values, and not a sum that is still to be taken over the devices.
bool is_whole(PyObject* dtensor) {
  THPObjectPtr placements(PyObject_GetAttrString(dtensor, "placements"));
  if (!placements || !PyTuple_Check(placements.get())) return PyErr_Clear(), false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(placements.get()); ++i) {
    THPObjectPtr partial(PyObject_CallMethod(PyTuple_GET_ITEM(placements.get(), i), "is_partial", nullptr));
    if (partial.get() != Py_False) return PyErr_Clear(), false;
  }
  return true;
}

// The part of a DTensor that lies here, where it is cut as `like` is; null otherwise. The DTensor holds it.
const Tensor* shard(PyObject* o, PyObject* like) {
  static PyObject* const k_local = interned("_local_tensor");
  static PyObject* const k_layout[] = {interned("device_mesh"), interned("placements")};
  if (!is_dtensor(o)) return nullptr;
  for (PyObject* k : k_layout) {
    if (o == like) break;
    THPObjectPtr a(PyObject_GetAttr(o, k)), b(PyObject_GetAttr(like, k));
    if (!a || !b || PyObject_RichCompareBool(a, b, Py_EQ) != 1) return PyErr_Clear(), nullptr;
  }
  THPObjectPtr local(PyObject_GetAttr(o, k_local));
  if (!local || !is_plain(local)) return PyErr_Clear(), nullptr;
  return &THPVariable_Unpack(local.get());
}

// Everything the update needs, read afresh: nothing is kept from step to step, so nothing can be out of date.
bool read_group(PyObject* group, StateReader& state, AdamWGroup& out) {
  static PyObject* const k_params = interned("params");
  static PyObject* const k_lr = interned("lr");
  static PyObject* const k_betas = interned("betas");
  static PyObject* const k_weight_decay = interned("weight_decay");
  static PyObject* const k_eps = interned("eps");
  static PyObject* const k_amsgrad = interned("amsgrad");
  static PyObject* const k_maximize = interned("maximize");
  static PyObject* const k_capturable = interned("capturable");
  static PyObject* const k_differentiable = interned("differentiable");
  static PyObject* const k_decoupled = interned("decoupled_weight_decay");
  static PyObject* const k_foreach = interned("foreach");
  static PyObject* const k_state[] = {
      interned("step"), interned("exp_avg"), interned("exp_avg_sq"), interned("max_exp_avg_sq")};

  if (!PyDict_Check(group)) return false;
  bool amsgrad, capturable, differentiable, decoupled, foreach;
  if (!flag(group, k_amsgrad, amsgrad) || !flag(group, k_maximize, out.maximize) ||
      !flag(group, k_capturable, capturable) || !flag(group, k_differentiable, differentiable) ||
      !flag(group, k_decoupled, decoupled) || !flag(group, k_foreach, foreach))
    return false;
  PyObject *lr = PyDict_GetItem(group, k_lr), *betas = PyDict_GetItem(group, k_betas);
  // torch refuses a tensor lr with foreach=True, and says so.
  if (differentiable || !decoupled || (foreach && lr && is_plain(lr))) return false;
  if (!betas || !PyTuple_Check(betas) || PyTuple_GET_SIZE(betas) != 2) return false;
  const bool device_lr = lr && is_plain(lr) && THPVariable_Unpack(lr).is_cuda();
  if (device_lr) out.device_lr = THPVariable_Unpack(lr);
  if (device_lr ? !ordinary(out.device_lr) || out.device_lr.numel() != 1 : !number(lr, out.lr)) return false;
  if (!unpack_double(PyTuple_GET_ITEM(betas, 0), out.beta1) || !unpack_double(PyTuple_GET_ITEM(betas, 1), out.beta2) ||
      !number(PyDict_GetItem(group, k_weight_decay), out.weight_decay) ||
      !number(PyDict_GetItem(group, k_eps), out.eps))
    return false;

  PyObject* params = PyDict_GetItem(group, k_params);
  if (!params || !PyList_Check(params)) return false;
  const Py_ssize_t n = PyList_GET_SIZE(params);
  for (auto* list : {&out.params, &out.grads, &out.exp_avgs, &out.exp_avg_sqs, &out.state_steps}) list->reserve(n);
  const Tensor none;
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* p = PyList_GET_ITEM(params, i);
    const bool plain = is_plain(p);
    if (!plain && !is_dtensor(p)) return false;
    const Tensor &whole = THPVariable_Unpack(p), &whole_grad = whole.grad();
    if (!whole_grad.defined()) continue;
    // The update goes element by element: where parameter, gradient and moments are cut alike, shard by shard.
    const Tensor *param = &whole, *grad = &whole_grad;
    if (!plain) {
      THPObjectPtr g(THPVariable_Wrap(whole_grad));
      if (!is_whole(p) || !(param = shard(p, p)) || !(grad = shard(g, p))) return false;
      out.sharded.add(whole);
    }
    PyObject *s = state.of(p), *values[4];
    if (!s) return false;
    const size_t count = amsgrad ? 4 : 3;
    look_up(s, k_state, count, values);
    const Tensor* state_of_p[4] = {nullptr, nullptr, nullptr, &none};
    for (size_t k = 0; k < count; ++k) {
      PyObject* o = values[k];
      if (!o) return false;
      const bool as_is = plain || k == 0;  // the step is never cut
      state_of_p[k] = !as_is ? shard(o, p) : is_plain(o) ? &THPVariable_Unpack(o) : nullptr;
      if (!state_of_p[k] || !ordinary(*state_of_p[k])) return false;
    }
    const auto [step, exp_avg, exp_avg_sq, top] = state_of_p;
    if (!served(kAdamW, *param) || !ordinary(*param) || !ordinary(*grad) ||
        !covers_adamw(*param, *grad, *exp_avg, *exp_avg_sq, *top, *step))
      return false;
    if (capturable && !step->is_cuda()) return false;  // torch's own error
    out.params.add(*param);
    out.grads.add(*grad);
    out.exp_avgs.add(*exp_avg);
    out.exp_avg_sqs.add(*exp_avg_sq);
    out.state_steps.add(*step);
    if (amsgrad) out.max_exp_avg_sqs.add(*top);
    out.elements += param->numel();
  }
  return true;
}

// Elements from which other Python threads may run during a step, some milliseconds. What they could let go of is then
// held by references.
constexpr int64_t kReleaseGil = int64_t(1) << 24;

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
    if (g.elements < kReleaseGil) {
      g.step(grad_scale, found_inf);
      continue;
    }
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

#define FAST(name, function) {name, (PyCFunction)(void (*)(void))function, METH_FASTCALL, nullptr}
PyMethodDef methods[] = {
    FAST("layer_norm", py_layer_norm),
    FAST("gelu", py_gelu),
    FAST("linear_gelu", py_linear_gelu<false>),
    FAST("linear_gelu_pre", py_linear_gelu<true>),
    FAST("adamw_", py_adamw_),
    {"hold", py_hold, METH_O, nullptr},
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
