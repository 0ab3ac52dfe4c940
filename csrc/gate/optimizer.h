// How the groups and the state of a torch optimizer are read: afresh at every step, so that nothing can be out of date.
#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/object_ptr.h>

#include <vector>

#include "gate.h"

namespace nnfast {

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

inline bool flag(PyObject* group, PyObject* key, bool& out) {
  PyObject* o = PyDict_GetItem(group, key);
  const int truth = o ? PyObject_IsTrue(o) : -1;
  if (truth < 0) return PyErr_Clear(), false;
  out = truth;
  return true;
}

inline bool number(PyObject* o, double& out) {
  if (!o) return false;
  if (!is_plain(o)) return unpack_double(o, out);
  const Tensor& t = THPVariable_Unpack(o);
  if (!ordinary(t) || t.numel() != 1) return false;
  out = t.item<double>();
  return true;
}

// A tensor of exactly torch's type DTensor. Where nobody has imported that, there is none.
inline bool is_dtensor(PyObject* o) {
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
inline bool is_whole(PyObject* dtensor) {
  THPObjectPtr placements(PyObject_GetAttrString(dtensor, "placements"));
  if (!placements || !PyTuple_Check(placements.get())) return PyErr_Clear(), false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(placements.get()); ++i) {
    THPObjectPtr partial(PyObject_CallMethod(PyTuple_GET_ITEM(placements.get(), i), "is_partial", nullptr));
    if (partial.get() != Py_False) return PyErr_Clear(), false;
  }
  return true;
}

// The part of a DTensor that lies here, where it is cut as `like` is; null otherwise. The DTensor holds it.
inline const Tensor* shard(PyObject* o, PyObject* like) {
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
inline bool read_group(PyObject* group, StateReader& state, AdamWGroup& out) {
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

}  // namespace nnfast
