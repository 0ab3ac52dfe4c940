// The ops' contracts, which the host code asks which calls are covered; the extension does not export its own. The ops
// are not registered a second time.
#include <torch/library.h>

#undef TORCH_LIBRARY_FRAGMENT
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_FRAGMENT(ns, m) [[maybe_unused]] static void C10_ANONYMOUS_VARIABLE(unused)(torch::Library & m)
#define TORCH_LIBRARY_IMPL(ns, key, m) TORCH_LIBRARY_FRAGMENT(ns, m)

#include "ops/adamw.cpp"
#include "ops/clip_grad.cpp"
#include "ops/layer_norm.cpp"
#include "ops/linear.cpp"
#include "ops/linear_gelu.cpp"
#include "ops/op.cpp"
#include "ops/optimizer.cpp"
#include "ops/rmsprop.cpp"
#include "ops/sgd.cpp"
