// What the ops of the optimizers share. Each has a struct of its arguments, in the order of its schema. All other code
// reads that struct: only `Flat` and the struct's call operator know the flat list.
#pragma once

#include <c10/core/InferenceMode.h>

#include <array>
#include <type_traits>

#include "op.h"

namespace nnfast {

// f(const Call&) as the function of flat arguments that the dispatcher knows.
template <class Call, void (*f)(const Call&), class Signature = typename Call::Signature>
struct Flat;
template <class Call, void (*f)(const Call&), class... T>
struct Flat<Call, f, void(T...)> {
  static void call(T... t) { f(Call{t...}); }
};

// Adam and AdamW. A list of state is empty where the optimizer keeps none of it; in master_params, a tensor is
// undefined where the parameter is its own master.
struct AdamWCall {
  using List = at::TensorList;
  using Signature = void(
      List, List, List, List, List, List, List, double, double, double, double, double, bool, bool, const OptTensor&,
      const OptTensor&, const OptTensor&, const OptTensor&, std::optional<int64_t>);
  static constexpr const char* kName = "adamw_";
  static constexpr std::array kState = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param"};
  static constexpr size_t kMaster = 3;  // of kState

  List params, grads;
  std::array<List, 4> state;
  List state_steps;
  double lr, beta1, beta2, weight_decay, eps;
  bool decoupled_weight_decay, maximize;
  OptTensor tensor_lr, grad_scale, found_inf, clip_coef;
  std::optional<int64_t> rounding_seed;

  bool wants(size_t k) const { return k < 2 || !state[k].empty(); }
  void operator()() const {
    static const auto op = find_op<Signature>(kName);
    op.call(
        params, grads, state[0], state[1], state[2], state[3], state_steps, lr, beta1, beta2, weight_decay, eps,
        decoupled_weight_decay, maximize, tensor_lr, grad_scale, found_inf, clip_coef, rounding_seed);
  }
};

struct SgdCall {
  using List = at::TensorList;
  using Signature = void(
      List, List, List, double, double, double, double, bool, bool, const OptTensor&, const OptTensor&,
      const OptTensor&);
  static constexpr const char* kName = "sgd_";
  static constexpr std::array kState = {"momentum_buffer"};
  static constexpr size_t kMaster = 1;  // none

  List params, grads;
  std::array<List, 1> state;
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
  OptTensor tensor_lr, grad_scale, found_inf;
  // Not in the schema: the code for all optimizers reads them.
  List state_steps{};
  OptTensor clip_coef{};
  std::optional<int64_t> rounding_seed{};

  bool wants(size_t) const { return momentum != 0; }
  void operator()() const {
    static const auto op = find_op<Signature>(kName);
    op.call(
        params, grads, state[0], lr, momentum, dampening, weight_decay, nesterov, maximize, tensor_lr, grad_scale,
        found_inf);
  }
};

struct RMSpropCall {
  using List = at::TensorList;
  using Signature =
      void(List, List, List, List, List, List, double, double, double, double, double, bool, bool, const OptTensor&);
  static constexpr const char* kName = "rmsprop_";
  static constexpr std::array kState = {"square_avg", "momentum_buffer", "grad_avg"};
  static constexpr size_t kMaster = 3;  // none

  List params, grads;
  std::array<List, 3> state;
  List state_steps;
  double lr, alpha, eps, weight_decay, momentum;
  bool centered, maximize;
  OptTensor tensor_lr;
  // Not in the schema: the code for all optimizers reads them.
  OptTensor grad_scale{}, found_inf{}, clip_coef{};
  std::optional<int64_t> rounding_seed{};

  bool wants(size_t k) const { return k == 0 || (k == 1 ? momentum > 0 : centered); }
  void operator()() const {
    static const auto op = find_op<Signature>(kName);
    op.call(
        params, grads, state[0], state[1], state[2], state_steps, lr, alpha, eps, weight_decay, momentum, centered,
        maximize, tensor_lr);
  }
};

// Whether it was made in inference mode and must not be changed out of it: torch's error says so.
inline bool forbidden(const Tensor& t) { return t.is_inference() && !c10::InferenceMode::is_enabled(); }

// Whether the kernels take one parameter with its gradient and state. `state` holds null, or an undefined tensor, where
// there is none; the master is beside it. `step` may be null. mixed_dtypes: for a kernel that takes the gradient and
// the state in a 16-bit type or float other than the parameter's.
bool covers_step(
    const Tensor& param, const Tensor& grad, at::ArrayRef<const Tensor*> state, const Tensor* master,
    const Tensor* step, bool mixed_dtypes = false);

// The same for every parameter of a call.
template <class Call>
bool covers_call(const Call& a, bool mixed_dtypes = false) {
  constexpr size_t kLists = Call::kState.size();
  const size_t n = a.params.size(), steps = a.state_steps.size();
  if (a.grads.size() != n || (steps != n && (steps || !std::is_same_v<Call, SgdCall>))) return false;
  for (size_t k = 0; k < kLists; ++k)
    if (a.state[k].size() != (a.wants(k) ? n : 0)) return false;
  for (size_t i = 0; i < n; ++i) {
    std::array<const Tensor*, kLists> state{};
    const Tensor* master = nullptr;
    for (size_t k = 0; k < kLists; ++k) {
      if (a.state[k].empty()) continue;
      (k == Call::kMaster ? master : state[k]) = &a.state[k][i];
    }
    if (!covers_step(a.params[i], a.grads[i], state, master, steps ? &a.state_steps[i] : nullptr, mixed_dtypes))
      return false;
  }
  return true;
}

// A norm over many tensors and their scaling: the schemas are in clip_grad.cpp.
bool covers_clip(const Tensor& t);
Tensor total_norm(at::TensorList tensors, double norm_type);
void scale_(at::TensorList tensors, double factor);
std::tuple<Tensor, Tensor> clip_coef(at::TensorList tensors, double max_norm, const OptTensor& grad_scale);
void scale_by_(at::TensorList tensors, const Tensor& factor);
// The dtype of their norm.
at::ScalarType norm_dtype(at::TensorList tensors);

// What torch's own in-place ops do around the change: refuse a leaf that is being recorded, and count the version up,
// so that a graph which saved the old value notices.
void check_in_place(at::TensorList params);
void count_version(at::TensorList changed);

template <class F>
void in_place(at::TensorList changed, const F& call) {
  check_in_place(changed);
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    call();
  }
  count_version(changed);
}

template <class Call>
void step_autograd(const Call& a) {
  in_place(a.params, a);
  for (const auto& list : a.state) count_version(list);
  count_version(a.state_steps);
  if (defined(a.grad_scale)) count_version(a.grads);
}

template <class Call>
void step_meta(const Call&) {}

}  // namespace nnfast
