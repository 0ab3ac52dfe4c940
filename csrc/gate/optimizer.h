// How the groups and the state of a torch optimizer are read: afresh at every step, so that nothing can be out of date.
#pragma once

#include <ATen/ops/empty_like.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/object_ptr.h>

#include <deque>
#include <vector>

#include "../ops/optimizer.h"
#include "../ops/paths.h"
#include "gate.h"

namespace nnfast {

extern Path reordered_gradient;

// Tensors that are borrowed: counting a reference, and giving it back, costs a tenth of a microsecond, for Python's
// count of a tensor that it knows changes too. The optimizer holds them, so they stay alive while no other thread runs.
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

// One group of an optimizer, and its op's arguments.
template <class Call>
struct Group {
  static constexpr size_t kLists = Call::kState.size();

  Call call{};  // its numbers; its lists are these:
  Borrowed params, grads, state_steps;
  std::array<Borrowed, kLists> state;
  std::array<bool, kLists> wanted{};
  bool capturable = false, whole = true;  // whole: whether our kernels cover the group's options
  Borrowed sharded;                       // the parameters that are DTensors: of them, params holds the shards
  std::deque<Tensor> reordered;           // copies of gradients, with their parameters' strides
  std::vector<PyObject*> left;            // the parameters that are torch's, borrowed
  int64_t elements = 0;

  void step() {
    if (params.tensors().empty()) return;
    call.params = params.tensors();
    call.grads = grads.tensors();
    call.state_steps = state_steps.tensors();
    for (size_t k = 0; k < kLists; ++k) call.state[k] = state[k].tensors();
    call();
    for (const auto& t : sharded.tensors()) t.unsafeGetTensorImpl()->bump_version();
  }
  std::vector<Tensor> held() const {
    std::vector<Tensor> all;
    const auto add = [&](const Borrowed& list) { all.insert(all.end(), list.tensors().begin(), list.tensors().end()); };
    add(params), add(grads), add(state_steps), add(sharded);
    for (const auto& list : state) add(list);
    return all;
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
    while (PyDict_Next(state_, &position_, &key, &value))
      if (key == param) return PyDict_Check(value) ? value : nullptr;
    value = PyDict_GetItemWithError(state_, param);
    if (!value && PyErr_Occurred()) throw python_error();
    return value && PyDict_Check(value) ? value : nullptr;
  }

 private:
  PyObject* state_;
  Py_ssize_t position_ = 0;
};

// The values of `keys` in a dict, null for one that is missing. A dict is most quickly read in its own order, which is
// that of the keys wherever torch's optimizer made it.
inline void look_up(PyObject* dict, PyObject* const* keys, size_t count, PyObject** values) {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (size_t i = 0; i < count; ++i) {
    const bool next = PyDict_Next(dict, &position, &key, &value);
    values[i] = next && key == keys[i] ? value : PyDict_GetItem(dict, keys[i]);
  }
}

inline bool number(PyObject* o, double& out) {
  if (!o) return false;
  if (!is_plain(o)) return unpack_double(o, out);
  const Tensor& t = THPVariable_Unpack(o);
  if (!ordinary(t) || t.numel() != 1 || t.requires_grad() || t.is_complex()) return false;
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

// ---- the options of a group, optimizer by optimizer ----

// The names as interned strings: the keys of a dict are found sooner by them.
template <size_t N>
std::array<PyObject*, N> interned_all(const std::array<const char*, N>& names) {
  std::array<PyObject*, N> keys;
  for (size_t i = 0; i < N; ++i) keys[i] = interned(names[i]);
  return keys;
}

inline bool numbers(PyObject* group, std::initializer_list<std::pair<PyObject*, double*>> wanted) {
  for (const auto& [key, out] : wanted)
    if (!number(PyDict_GetItem(group, key), *out)) return false;
  return true;
}
inline bool flags(PyObject* group, std::initializer_list<std::pair<PyObject*, bool*>> wanted) {
  for (const auto& [key, out] : wanted) {
    PyObject* o = PyDict_GetItem(group, key);
    const int truth = o ? PyObject_IsTrue(o) : -1;
    if (truth < 0) return PyErr_Clear(), false;
    *out = truth;
  }
  return true;
}

#define NNFAST_KEY(name)                         \
  []() -> PyObject* {                            \
    static PyObject* const key = interned(name); \
    return key;                                  \
  }()

// lr, a number or a tensor of one, and what all optimizers share. A tensor lr with foreach=True is left to torch, whose
// error says why it is refused.
template <class Call>
bool read_shared(PyObject* group, Group<Call>& out) {
  bool differentiable, foreach;
  if (!flags(
          group, {{NNFAST_KEY("maximize"), &out.call.maximize},
                  {NNFAST_KEY("differentiable"), &differentiable},
                  {NNFAST_KEY("foreach"), &foreach}}))
    return false;
  PyObject* lr = PyDict_GetItem(group, NNFAST_KEY("lr"));
  if (!lr || differentiable || (foreach && is_plain(lr))) return false;
  if (is_plain(lr) && THPVariable_Unpack(lr).is_cuda()) {
    const Tensor& t = *(out.call.tensor_lr = THPVariable_Unpack(lr));
    return ordinary(t) && t.numel() == 1 && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble);
  }
  return number(lr, out.call.lr);
}

inline bool read_options(PyObject* group, Group<AdamWCall>& out) {
  auto& a = out.call;
  bool amsgrad, fused;  // fused: read because torch reads it
  PyObject* betas = PyDict_GetItem(group, NNFAST_KEY("betas"));
  if (!read_shared(group, out) ||
      !flags(
          group, {{NNFAST_KEY("amsgrad"), &amsgrad},
                  {NNFAST_KEY("fused"), &fused},
                  {NNFAST_KEY("capturable"), &out.capturable},
                  {NNFAST_KEY("decoupled_weight_decay"), &a.decoupled_weight_decay}}) ||
      !numbers(group, {{NNFAST_KEY("weight_decay"), &a.weight_decay}, {NNFAST_KEY("eps"), &a.eps}}) || !betas ||
      !PyTuple_Check(betas) || PyTuple_GET_SIZE(betas) != 2)
    return false;
  out.wanted = {true, true, amsgrad, false};
  // Beyond these bounds torch's corrections of the bias may have no value: its errors.
  return unpack_double(PyTuple_GET_ITEM(betas, 0), a.beta1) && unpack_double(PyTuple_GET_ITEM(betas, 1), a.beta2) &&
         a.beta1 >= 0 && a.beta1 < 1 && a.beta2 >= 0 && a.beta2 < 1;
}

inline bool read_options(PyObject* group, Group<SgdCall>& out) {
  auto& a = out.call;
  bool fused;  // read because torch reads it
  if (!read_shared(group, out) ||
      !flags(group, {{NNFAST_KEY("nesterov"), &a.nesterov}, {NNFAST_KEY("fused"), &fused}}) ||
      !numbers(
          group, {{NNFAST_KEY("momentum"), &a.momentum},
                  {NNFAST_KEY("dampening"), &a.dampening},
                  {NNFAST_KEY("weight_decay"), &a.weight_decay}}))
    return false;
  out.wanted = {a.momentum != 0};
  return true;
}

inline bool read_options(PyObject* group, Group<RMSpropCall>& out) {
  auto& a = out.call;
  if (!read_shared(group, out) ||
      !flags(group, {{NNFAST_KEY("centered"), &a.centered}, {NNFAST_KEY("capturable"), &out.capturable}}) ||
      !numbers(
          group, {{NNFAST_KEY("alpha"), &a.alpha},
                  {NNFAST_KEY("eps"), &a.eps},
                  {NNFAST_KEY("weight_decay"), &a.weight_decay},
                  {NNFAST_KEY("momentum"), &a.momentum}}))
    return false;
  out.wanted = {true, a.momentum > 0, a.centered};
  return true;
}

// ---- the parameters of a group ----

// Whether the CUDA kernels cover it: only the CPU kernels know masters and stochastic rounding.
inline bool covers_on_gpu(const AdamWCall& a, bool master) { return !master && !a.rounding_seed; }
template <class Call>
bool covers_on_gpu(const Call&, bool) {
  return true;
}

// One parameter that has a gradient, added to the group's lists; false where it is torch's.
template <class Call>
bool read_param(PyObject* p, StateReader& states, bool exact, Group<Call>& out) {
  static const auto k_state = interned_all(Call::kState);
  static PyObject* const k_step = interned("step");
  constexpr size_t kLists = Group<Call>::kLists;
  constexpr bool kSteps = !std::is_same_v<Call, SgdCall>;
  const bool plain = is_plain(p);
  // The update is elementwise: where parameter, gradient and state are cut alike, each shard is updated by itself.
  const Tensor &whole = THPVariable_Unpack(p), &whole_grad = whole.grad();
  const Tensor *param = &whole, *grad = &whole_grad;
  if (!plain) {
    THPObjectPtr g(THPVariable_Wrap(whole_grad));
    if (!is_whole(p) || !(param = shard(p, p)) || !(grad = shard(g, p))) return false;
  } else if (PyObject* g = whole_grad.unsafeGetTensorImpl()->pyobj_slot()->load_pyobj(); g && !is_plain(g)) {
    return false;  // a subclass, which Python may have given functions of its own
  }
  // The keys, in the order in which torch's optimizer makes the entries: look_up() is fastest in the dict's own.
  std::array<bool, kLists> wanted = out.wanted;
  const bool master = exact && Call::kMaster < kLists && param->scalar_type() == at::kBFloat16;
  if constexpr (Call::kMaster < kLists) wanted[Call::kMaster] = master;
  PyObject* keys[kLists + 1];
  size_t count = 0;
  if (kSteps) keys[count++] = k_step;
  for (size_t k = 0; k < kLists; ++k)
    if (wanted[k]) keys[count++] = k_state[k];
  PyObject *values[kLists + 1], *s = count ? states.of(p) : nullptr;
  if (count && !s) return false;
  if (count) look_up(s, keys, count, values);
  const Tensor* found[kLists + 1];
  for (size_t k = 0; k < count; ++k) {
    if (!values[k]) return false;
    const bool as_is = plain || (kSteps && k == 0);  // the step is never cut
    found[k] = !as_is ? shard(values[k], p) : is_plain(values[k]) ? &THPVariable_Unpack(values[k]) : nullptr;
    if (!found[k] || !ordinary(*found[k])) return false;
  }
  const Tensor* step = kSteps ? found[0] : nullptr;
  std::array<const Tensor*, kLists> state{};
  const Tensor* low = nullptr;
  for (size_t k = 0, next = kSteps; k < kLists; ++k)
    if (wanted[k]) (k == Call::kMaster ? low : state[k]) = found[next++];
  if (!served(op_called(Call::kName), *param) || !ordinary(*param) || !ordinary(*grad) ||
      !covers_step(*param, *grad, state, low, step))
    return false;
  if (!param->is_cpu() &&
      (!covers_on_gpu(out.call, master) || (out.wanted[0] && state[0]->scalar_type() != param->scalar_type())))
    return false;
  if (out.capturable && (!step || !step->is_cuda())) return false;  // torch raises its own error
  // All parameters are on one device; their steps are all there, or all on the CPU; a GradScaler's numbers are there.
  const auto there = [&](const OptTensor& t) { return !defined(t) || t->device() == param->device(); };
  if (!out.params.tensors().empty() && (out.params.tensors()[0].device() != param->device() ||
                                        (step && out.state_steps.tensors()[0].device() != step->device())))
    return false;
  if (!there(out.call.grad_scale) || !there(out.call.found_inf) || !there(out.call.tensor_lr) ||
      !there(out.call.clip_coef))
    return false;
  if (param->is_cpu() && grad->strides() != param->strides()) {
    // Copied here, before any group has changed. With grad_scale the gradient would have to be written back as well.
    if (defined(out.call.grad_scale)) return false;
    out.reordered.push_back(at::empty_like(*param));
    out.reordered.back().copy_(grad->detach());
    reordered_gradient.taken();
    grad = &out.reordered.back();
  }
  out.params.add(*param);
  out.grads.add(*grad);
  if (step) out.state_steps.add(*step);
  static const Tensor none;
  for (size_t k = 0; k < kLists; ++k)
    if (out.wanted[k]) out.state[k].add(*state[k]);
  if constexpr (Call::kMaster < kLists)
    if (exact) out.state[Call::kMaster].add(low ? *low : none);
  if (!plain) out.sharded.add(whole);
  out.elements += param->numel();
  return true;
}

// The lists of a group. `exact`: whether bfloat16 parameters have masters; `skipped`: null, or a set of parameters.
// False where the group cannot be read at all.
template <class Call>
bool read_group(PyObject* group, StateReader& states, bool exact, PyObject* skipped, Group<Call>& out) {
  if (!PyDict_Check(group)) return false;
  PyObject* params = PyDict_GetItem(group, NNFAST_KEY("params"));
  if (!params || !PyList_Check(params)) return false;
  out.whole = read_options(group, out);
  const Py_ssize_t n = PyList_GET_SIZE(params);
  for (auto* list : {&out.params, &out.grads, &out.state_steps}) list->reserve(n);
  for (size_t k = 0; k < out.state.size(); ++k)
    if (out.wanted[k]) out.state[k].reserve(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* p = PyList_GET_ITEM(params, i);
    if (!is_plain(p) && !is_dtensor(p)) return false;
    if (!THPVariable_Unpack(p).grad().defined() || (skipped && PySet_Contains(skipped, p) != 0)) continue;
    if (!out.whole || !read_param(p, states, exact, out)) out.left.push_back(p);
  }
  return true;
}

}  // namespace nnfast
