// How a Linear is recorded for the backward, and how a GELU that reads it saves it a pass over the gradient.
//
// The GELU's node has every row of the gradient at hand when it makes it. It sums them on the way, which is the bias's
// gradient, and leaves the sums at the Linear's node, which uses them if that same, unchanged gradient arrives. Where
// it does not, the sums cost time and change no digit.
#pragma once

#include <mutex>

#include "../gate/autograd.h"
#include "op.h"

namespace nnfast {

// As torch does, with the input saved for the weight's gradient and the weight for the input's.
struct Linear {
  static constexpr auto name = "LinearBackward";
  static constexpr bool is_traceable = false;
  static variable_list backward(AutogradContext* ctx, const variable_list& grads);
};

class LinearNode : public OpNode<Linear> {
 public:
  void release_variables() override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      sums_ = {};
    }
    OpNode<Linear>::release_variables();
  }

  bool wants_sums() { return task_should_compute_output(2); }
  // Leaves `sums`, those over the rows of a gradient that goes to this node.
  void leave_sums(const Tensor& grad, Tensor sums) {
    if (grad.is_inference()) return;  // it does not count its changes
    const std::lock_guard<std::mutex> lock(mutex_);
    sums_ = {std::move(sums), Impl(grad.getIntrusivePtr()), grad._version()};
  }
  // The sums over the rows of `grad`, if they were left here for this very tensor, and nothing has come in between: a
  // hook could change it in ways that no version counts.
  Tensor take_sums(const Tensor& grad) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Sums found = std::exchange(sums_, {});
    const bool same = found.of && found.of->lock().get() == grad.unsafeGetTensorImpl() &&
                      found.version == grad._version() && tensor_pre_hooks().empty() && pre_hooks().empty() &&
                      retains_grad_hooks().empty();
    return same ? found.sums : Tensor();
  }

 private:
  using Impl = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  struct Sums {
    Tensor sums;
    std::optional<Impl> of;
    int64_t version = 0;
  };

  std::mutex mutex_;
  Sums sums_;
};

// Records `output` as input weight^T + bias; cast_... are what autocast made of them, if it did.
void record_linear(
    const Tensor& output, const Tensor& input, const Tensor& weight, const OptTensor& bias, const Tensor& cast_input,
    const Tensor& cast_weight);

}  // namespace nnfast
