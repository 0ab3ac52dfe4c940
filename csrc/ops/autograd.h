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

#include "op.h"

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

// What at::alias(t) gives of a plain tensor, without the two calls through the dispatcher, which took 2.8 us of a small
// Linear's 13: a view to save. The memory is then still there if the `data` of t is replaced before the backward. A
// gradient of it goes where t's goes.
inline at::Tensor view_to_save(const at::Tensor& t) {
  using namespace torch::autograd;
  at::TensorImpl& self = *t.unsafeGetTensorImpl();
  const at::Tensor view = make_variable_differentiable_view(
      at::Tensor(self.shallow_copy_and_detach(self.version_counter(), /*allow_tensor_metadata_change=*/true)),
      ViewInfo(t.is_view() ? at::Tensor(t._base()) : t, nullptr, nullptr), std::nullopt, /*shared_view_info=*/false,
      CreationMeta::DEFAULT);
  if (t.requires_grad()) impl::set_gradient_edge(view, impl::gradient_edge(t));
  return view;
}

// How a node computes the gradients of `grad`. To be made after the saved tensors have been asked for: unpacking one
// may run any code, such as the forward once more under checkpointing, which must be recorded. `saved` is one of them.
//
// While nobody differentiates the backward itself, the op is called below autograd at once, a tenth of a microsecond
// sooner. Where the forward was plain eager execution and the backward is not, under a mode, a transform or a tracer,
// or for a gradient that is no plain tensor, it is torch's ops that are called: they are what a mode counts, what a
// transform has rules for, and what may stay in a graph. A forward that was traced leaves our op in the graph.
class BackwardWay {
 public:
  BackwardWay(const at::Tensor& grad, const at::Tensor& saved)
      : recorded_(at::GradMode::is_enabled() || has_tangent(grad)), plain_(plain_thread() && ordinary(grad)) {
    in_aten_ = !plain_ && ordinary(saved);
    if (!recorded_ && !in_aten_) guard_.emplace();
  }
  bool recorded() const { return recorded_; }
  // Whether one backward may work ahead for another, or write where it reads: nobody looks on.
  bool unseen() const { return plain_ && !recorded_; }
  // The op, or the same in ATen's.
  template <class F>
  F* choose(F* op, F* aten) const {
    return in_aten_ ? aten : op;
  }

 private:
  bool recorded_, plain_, in_aten_;
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard_;
};

}  // namespace nnfast
