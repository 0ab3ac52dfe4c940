#include "op.h"

namespace nnfast {

bool within(c10::DispatchKeySet keys, c10::DispatchKeySet allowed) {
  // Subtracting key sets leaves the backend bits alone, so the bits themselves are compared.
  return (keys.raw_repr() & ~allowed.raw_repr()) == 0;
}

bool ordinary(const Tensor& t) {
  static const c10::DispatchKeySet plain = c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::CUDA}) |
                                           c10::autocast_dispatch_keyset |
                                           c10::autograd_dispatch_keyset_with_ADInplaceOrView;
  return within(t.key_set(), plain);
}

}  // namespace nnfast
