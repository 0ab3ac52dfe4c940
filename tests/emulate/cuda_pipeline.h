// CUDA's asynchronous copies into shared memory, as late as they may come: while they are on their way, a NaN's bytes
// stand there.
#pragma once

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size) {
  for (size_t i = 0; i < size; i += sizeof(uint4)) {
    auto* const a = static_cast<uint4*>(to) + i / sizeof(uint4);
    *a = {~0u, ~0u, ~0u, ~0u};
    emulate::copies().push_back({a, static_cast<const uint4*>(from) + i / sizeof(uint4)});
  }
}
inline void __pipeline_commit() { emulate::copies().push_back({nullptr, nullptr}); }
inline void __pipeline_wait_prior(size_t groups) {
  auto& copies = emulate::copies();
  for (auto left = std::count(copies.begin(), copies.end(), emulate::Copy{}); left > static_cast<ptrdiff_t>(groups);
       copies.pop_front()) {
    const emulate::Copy c = copies.front();
    if (c.to)
      *c.to = *c.from;
    else
      --left;
  }
}
