// How a Linear is recorded for the backward, and what it and a GELU beside it work out for each other ahead.
//
// The node of a GELU that reads a Linear has every row of grad_input at hand as it makes it. It sums them on the way,
// which gives the Linear's grad_bias, and leaves the sums at the Linear's node, which uses them if that same, unchanged
// gradient arrives. Where it does not, the sums cost time and change no digit.
//
// A Linear that reads a GELU has, on a GPU, each tile of its grad_input at hand as the product ends. It works out there
// what the GELU's backward will be asked for, and leaves it at the GELU's node in the same way.
#pragma once

#include <mutex>

#include "autograd.h"
#include "op.h"

namespace nnfast {

// As torch does, with the input saved for the weight's gradient and the weight for the input's.
struct Linear {
  static constexpr auto name = "LinearBackward";
  static constexpr bool is_traceable = false;
  static variable_list backward(AutogradContext* ctx, const variable_list& grads);
};

// What was worked out ahead of a gradient that goes to a node.
template <class What>
class Ahead {
 public:
  void leave(const Tensor& grad, What what) {
    if (grad.is_inference()) return;  // it does not count its changes
    const std::lock_guard<std::mutex> lock(mutex_);
    left_ = Left{std::move(what), Impl(grad.getIntrusivePtr()), grad._version()};
  }
  // What was left for this very tensor, if nothing has come in between: a hook at the node that it goes to could change
  // it in ways that no version counts.
  std::optional<What> take(torch::autograd::Node& at, const Tensor& grad) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = std::exchange(left_, std::nullopt);
    if (!found || found->of.lock().get() != grad.unsafeGetTensorImpl() || found->version != grad._version() ||
        !at.tensor_pre_hooks().empty() || !at.pre_hooks().empty() || !at.retains_grad_hooks().empty())
      return std::nullopt;
    return found->what;
  }
  void let_go() {
    const std::lock_guard<std::mutex> lock(mutex_);
    left_.reset();
  }

 private:
  using Impl = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  struct Left {
    What what;
    Impl of;
    int64_t version;
  };

  std::mutex mutex_;
  std::optional<Left> left_;
};

// Whether nobody sees the gradient of input 0 on its way from `from` to `to`, and both run on one stream, so that `to`
// may use what `from` leaves there.
inline bool hands_on(torch::autograd::Node& from, torch::autograd::Node& to) {
  return from.post_hooks().empty() && from.input_metadata(0).stream() == to.input_metadata(0).stream();
}

class LinearNode : public OpNode<Linear> {
 public:
  // In the order of torch's addmm, in which the gradients of leaves are then ready.
  enum Edge { kBias, kInput, kWeight };

  void release_variables() override {
    sums.let_go();
    OpNode<Linear>::release_variables();
  }

  bool wants_sums() { return task_should_compute_output(kBias); }

  Ahead<Tensor> sums;        // over the rows of the gradient
  bool works_ahead = false;  // for a GELU that it reads
};

// The GELU's node, whichever of its formulas it is for.
class GeluNode {
 public:
  struct Grads {
    Tensor input, sums;
  };

  virtual ~GeluNode() = default;
  virtual torch::autograd::Node& node() = 0;
  virtual c10::string_view approximate() const = 0;
  // What it saved. Whoever asks first unpacks it, which may be done once a backward.
  virtual Tensor input() = 0;

  Ahead<Grads> grads;
};

// Records `output` as input weight^T + bias; cast_... are what autocast made of them, if it did.
void record_linear(
    const Tensor& output, const Tensor& input, const Tensor& weight, const OptTensor& bias, const Tensor& cast_input,
    const Tensor& cast_weight, bool works_ahead = false);

}  // namespace nnfast
