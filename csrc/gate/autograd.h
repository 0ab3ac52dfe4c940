// Recording an op for the backward pass, for the ops' own autograd kernels.
//
// torch::autograd::Function::apply keeps the shapes of all inputs, wraps the outputs for views and in-place changes,
// and carries a map of attributes: a microsecond a call, as much as a small LayerNorm takes. None of our ops needs
// that, so the node it would make (CppNode, which compiled autograd knows) is made and filled here.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <optional>
#include <type_traits>
#include <utility>

#include "../ops/op.h"

namespace nnfast {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// CppNode builds its name from the type's at every call.
template <class T>
struct OpNode : torch::autograd::CppNode<T> {
  std::string name() const override { return T::name; }
  // The engine says so right before the last backward through this node.
  void will_release_variables() override { last() = this; }

  static OpNode*& last() {
    static thread_local OpNode* node = nullptr;
    return node;
  }
};

// The node of ctx if this is the last backward through it, null otherwise. To be asked first of all, on the thread that
// runs the backward.
template <class T>
OpNode<T>* last_backward(const AutogradContext* ctx) {
  auto* const node = std::exchange(OpNode<T>::last(), nullptr);
  return node && &node->ctx_ == ctx ? node : nullptr;
}

// What the node saved goes: a saved tensor that was got from it before is then the caller's alone, unless somebody else
// holds it.
template <class T>
void let_go(OpNode<T>& node) {
  node.ctx_.save_for_backward({});
  node.save_variables_to_ctx();
}

// What let_go() let go is there again, for a second try.
template <class T>
void put_back(OpNode<T>& node, const variable_list& saved) {
  node.ctx_.save_for_backward(saved);
  node.save_variables_to_ctx();
}

// The node whose backward is running on this thread, if it is a T.
template <class T>
T* running_node() {
  const auto node = torch::autograd::get_current_node();
  return dynamic_cast<T*>(node ? &*node : nullptr);
}

// T has a name, and backward(ctx, grads), which gives one gradient for each of `inputs`, undefined where none is
// wanted: ctx->needs_input_grad(i) is false for an input that is not there or needs none. grads of unused outputs are
// undefined.
template <class T, class Node = OpNode<T>, class... Inputs>
auto make_node(const Inputs&... inputs) {
  if (const auto& functorch = at::functorch::functorchTLSAccessor()) functorch->checkSupportsCppAutogradFunction();
  auto node = [] {
    // torch 2.11 holds a node by shared_ptr; in a later torch a node counts its references itself.
    if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Node>)
      return c10::make_intrusive<Node>();
    else
      return std::shared_ptr<Node>(new Node(), [](auto* n) { deleteNode(n); });
  }();
  node->set_ctx_grad_fn(node);
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  node->is_variable_input_.assign(sizeof...(inputs), true);
  node->ctx_.set_materialize_grads(false);
  return node;
}

// The outputs that have a gradient, in order, and what the backward wants to see again.
template <class Node>
void record(const Node& node, at::ArrayRef<at::Tensor> outputs, variable_list saved) {
  for (const auto& output : outputs) torch::autograd::set_history(output, node);
  node->ctx_.save_for_backward(std::move(saved));
  node->save_variables_to_ctx();
}

// Around the call of a backward op, of the gradient `grad`: while nobody differentiates the backward itself, the op is
// called below autograd at once, a tenth of a microsecond sooner. To be made after the saved tensors have been asked
// for: unpacking one may run any code, such as the forward once more under checkpointing, which must be recorded.
class NotRecorded {
 public:
  explicit NotRecorded(const at::Tensor& grad) : recorded_(at::GradMode::is_enabled() || has_tangent(grad)) {
    if (!recorded_) guard_.emplace();
  }
  bool recorded() const { return recorded_; }

 private:
  bool recorded_;
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard_;
};

}  // namespace nnfast
