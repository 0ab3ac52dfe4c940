// A GELU that is computed together with the Linear before it, and recorded apart.
//
// The blocks of the product are in the cache when they have just been made, so there their GELU costs least. But the
// two are two calls of the user's, with a tensor between them that anybody may look at. So the Linear returns what it
// always returns, recorded as always, and the GELU waits at the node of its graph. A call of gelu on that same,
// unchanged tensor finds it there, and is recorded as always. In the backward the same goes the other way: the GELU's
// node has every row of the gradient at hand when it makes it, sums them for the bias, and leaves the sums at the
// Linear's node, which uses them if that same, unchanged gradient arrives. Whatever nobody asks for costs time, no
// digit.
#pragma once

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>

#include "../ops/op.h"
#include "autograd.h"

namespace nnfast {

// Which GELU reads the output of a Linear, as its calls have shown. One belongs to each module; it is only ever a
// guess.
class Follower {
 public:
  enum Gelu : int { none_known, erf, tanh };

  // A GELU has read the output. A guess that has been wrong more than once in nine times is not made again.
  void read_by(Gelu gelu) {
    if (wrong_ <= 1 + right_ / 8) gelu_ = gelu;
  }
  // What to compute ahead now. Where nobody has asked for the last one, this unlearns it.
  Gelu guess() {
    if (!open_.exchange(false)) {
      const Gelu gelu = gelu_;
      open_ = gelu != none_known;
      return gelu;
    }
    ++wrong_;
    return gelu_ = none_known;
  }
  void was_right() {
    open_ = false;
    ++right_;
  }
  Gelu known() const { return gelu_; }

 private:
  std::atomic<Gelu> gelu_{none_known};
  std::atomic<bool> open_{false};  // computed ahead, and not asked for yet
  std::atomic<int64_t> wrong_{0}, right_{0};
};

// How input weight^T + bias is recorded: as torch does, with the input saved for the weight's gradient and the weight
// for the input's.
struct Linear {
  static constexpr auto name = "LinearBackward";
  static constexpr bool is_traceable = false;
  static variable_list backward(AutogradContext* ctx, const variable_list& grads);
};

class LinearNode : public OpNode<Linear> {
 public:
  void release_variables() override {
    {
      const std::lock_guard<std::mutex> lock(left_mutex_);
      ahead_ = {};
      sums_ = {};
    }
    OpNode<Linear>::release_variables();
  }

  void follow(std::shared_ptr<Follower> follower) { follower_ = std::move(follower); }
  Follower* follower() const { return follower_.get(); }

  // Has gelu(pre) wait here, where pre is this node's output.
  void leave_gelu(const Tensor& pre, Tensor output, Follower::Gelu gelu) {
    ahead_ = {std::move(output), gelu, pre.const_data_ptr(), pre._version(), samples(pre)};
  }
  // It, if `gelu` of pre as it now is would be the same; undefined otherwise.
  Tensor take_gelu(const Tensor& pre, Follower::Gelu gelu) {
    const std::lock_guard<std::mutex> lock(left_mutex_);
    const Ahead found = std::exchange(ahead_, {});
    const bool same = found.output.defined() && found.gelu == gelu && found.data == pre.const_data_ptr() &&
                      found.version == pre._version() && pre.sizes() == found.output.sizes() && pre.is_contiguous() &&
                      found.samples == samples(pre);
    if (same && follower_) follower_->was_right();
    return same ? found.output : Tensor();
  }

  bool wants_sums() { return task_should_compute_output(2); }
  // Leaves `sums`, those over the rows of a gradient that goes to this node.
  void leave_sums(const Tensor& grad, Tensor sums) {
    if (grad.is_inference()) return;  // it does not count its changes
    const std::lock_guard<std::mutex> lock(left_mutex_);
    sums_ = {std::move(sums), Impl(grad.getIntrusivePtr()), grad._version()};
  }
  // The sums over the rows of `grad`, if they were left here for this very tensor, and nothing has come in between: a
  // hook could change it in ways that no version counts.
  Tensor take_sums(const Tensor& grad) {
    const std::lock_guard<std::mutex> lock(left_mutex_);
    const Sums found = std::exchange(sums_, {});
    const bool same = found.of && found.of->lock().get() == grad.unsafeGetTensorImpl() &&
                      found.version == grad._version() && tensor_pre_hooks().empty() && pre_hooks().empty() &&
                      retains_grad_hooks().empty();
    return same ? found.sums : Tensor();
  }

 private:
  using Impl = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  // Some elements of pre: a change of all of it through `.data` or NumPy, which no version counts, is seen by them.
  using Samples = std::array<char, 8 * sizeof(double)>;
  static Samples samples(const Tensor& pre) {
    Samples found{};
    const int64_t size = pre.element_size(), last = pre.numel() - 1;
    if (last >= 0 && pre.is_cpu())
      for (int64_t i = 0; i < 8; ++i)
        std::memcpy(&found[i * size], (const char*)pre.const_data_ptr() + last * i / 7 * size, size);
    return found;
  }

  struct Ahead {
    Tensor output;
    Follower::Gelu gelu = Follower::none_known;
    const void* data = nullptr;
    int64_t version = 0;
    Samples samples{};
  };

  struct Sums {
    Tensor sums;
    std::optional<Impl> of;
    int64_t version = 0;
  };

  std::shared_ptr<Follower> follower_;
  std::mutex left_mutex_;
  Ahead ahead_;
  Sums sums_;
};

// Records `output` as input weight^T + bias; `multiplied` is what autocast made of the weight, if it did.
void record_linear(
    const Tensor& output, const Tensor& input, const Tensor& weight, const OptTensor& bias, const Tensor& multiplied);

// input weight^T + bias, and the GELU with it that `follower` guesses, where anything is recorded.
Tensor linear_followed(
    const Tensor& input, const Tensor& weight, const OptTensor& bias, const std::shared_ptr<Follower>& follower);

// The node of `output`, if that is what a Linear of ours returned, and nobody has changed in place since.
inline LinearNode* linear_of(const Tensor& output) {
  auto* const meta = torch::autograd::impl::get_autograd_meta(output);
  return meta && meta->output_nr_ == 0 && !meta->is_view_ ? dynamic_cast<LinearNode*>(meta->grad_fn_.get()) : nullptr;
}

}  // namespace nnfast
