#include "op.h"

#include <ATen/autocast_mode.h>

#include "../cpu/memory.h"

namespace nnfast {

bool (*cuda_kernels_load)(c10::DeviceIndex device) = nullptr;

// Whether `allowed` has all of `keys`.
static bool within(c10::DispatchKeySet keys, c10::DispatchKeySet allowed) {
  // Subtracting key sets leaves the backend bits alone, so the bits themselves are compared.
  return (keys.raw_repr() & ~allowed.raw_repr()) == 0;
}

bool plain_thread() {
  // What a thread includes beyond the defaults is a transform, a mode or a tracer.
  return within(c10::impl::tls_local_dispatch_key_set().included_, c10::default_included_set);
}

bool ordinary(const Tensor& t) {
  static const c10::DispatchKeySet plain = c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::CUDA}) |
                                           c10::autocast_dispatch_keyset |
                                           c10::autograd_dispatch_keyset_with_ADInplaceOrView;
  return within(t.key_set(), plain);
}

Tensor autocast_to_lower(const Tensor& t, c10::DeviceType device) {
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const bool sized = t.is_cpu() && !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  const ForTorch memory(sized ? t.numel() * (int64_t)c10::elementSize(dtype) : 0);
  return at::autocast::cached_cast(dtype, t, device);
}

OptTensor autocast_to_lower(const OptTensor& t, c10::DeviceType device) {
  return defined(t) ? OptTensor(autocast_to_lower(*t, device)) : t;
}

}  // namespace nnfast
