// What the kernels of the optimizers share: how a gradient is read, and a parameter in bfloat16 kept more exactly.
#pragma once

#include "simd.h"

namespace nnfast::NNFAST_ISA {

// ---- float as bits ----
//
// A master: the float value of a bfloat16 parameter is the parameter and, in int16, how far its bits are from the
// parameter's. Rounding half up, and not to even, that always fits: from -0x8000 to 0x7fff. Exact both ways, and who
// sets the parameter from outside keeps what was set, to less than a unit.
//
//   param = (bits + 0x8000) >> 16      master = bits - (param << 16)      bits = (param << 16) + master
//
// Stochastic rounding: up with the probability of the part that is cut off, param = (bits + r) >> 16 for r drawn from
// [0, 2^16). r is a hash of a counter, the element's index, and a seed (the constants: Wellons, "Prospecting for Hash
// Functions", 2018), so that it repeats whatever the threads.
//
// NaN keeps none of its bits in either.
#ifdef NNFAST_AVX512
using bits_t = __m512i;
NNFAST_INLINE bits_t bits_of(f32v v) { return _mm512_castps_si512(v); }
NNFAST_INLINE bits_t all(uint32_t a) { return _mm512_set1_epi32((int)a); }
NNFAST_INLINE bits_t add(bits_t a, bits_t b) { return _mm512_add_epi32(a, b); }
NNFAST_INLINE bits_t multiply(bits_t a, bits_t b) { return _mm512_mullo_epi32(a, b); }
NNFAST_INLINE bits_t exclusive_or(bits_t a, bits_t b) { return _mm512_xor_si512(a, b); }
NNFAST_INLINE bits_t both(bits_t a, bits_t b) { return _mm512_and_si512(a, b); }
template <int n>
NNFAST_INLINE bits_t right(bits_t a) {
  return _mm512_srli_epi32(a, n);
}
NNFAST_INLINE bits_t unless_nan(f32v v, bits_t a, bits_t otherwise) {
  return _mm512_mask_mov_epi32(a, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), otherwise);
}
NNFAST_INLINE f32v read_master(const bf16* p, const int16_t* master) {
  const bits_t low = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)master));
  return _mm512_castsi512_ps(add(bits_of(load(p, Full<f32v>{})), low));
}
// The lower halves of the lanes.
NNFAST_INLINE void store_halves(void* p, bits_t a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(a)); }
#else
using bits_t = __m256i;
NNFAST_INLINE bits_t bits_of(f32v v) { return _mm256_castps_si256(v); }
NNFAST_INLINE bits_t all(uint32_t a) { return _mm256_set1_epi32((int)a); }
NNFAST_INLINE bits_t add(bits_t a, bits_t b) { return _mm256_add_epi32(a, b); }
NNFAST_INLINE bits_t multiply(bits_t a, bits_t b) { return _mm256_mullo_epi32(a, b); }
NNFAST_INLINE bits_t exclusive_or(bits_t a, bits_t b) { return _mm256_xor_si256(a, b); }
NNFAST_INLINE bits_t both(bits_t a, bits_t b) { return _mm256_and_si256(a, b); }
template <int n>
NNFAST_INLINE bits_t right(bits_t a) {
  return _mm256_srli_epi32(a, n);
}
NNFAST_INLINE bits_t unless_nan(f32v v, bits_t a, bits_t otherwise) {
  return _mm256_blendv_epi8(a, otherwise, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
NNFAST_INLINE f32v read_master(const bf16* p, const int16_t* master) {
  const bits_t low = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)master));
  return _mm256_castsi256_ps(add(bits_of(load(p, Full<f32v>{})), low));
}
// The two halves of packus are 128 bits apart: permute brings them together.
NNFAST_INLINE void store_halves(void* p, bits_t a) {
  const bits_t half = both(a, all(0xffff));
  const bits_t packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
#endif

NNFAST_INLINE void write_master(bf16* p, int16_t* master, f32v v) {
  const bits_t nan = all(0x7fc0), bits = bits_of(v);
  const bits_t param = unless_nan(v, right<16>(add(bits, all(0x8000))), nan);
  store_halves(p, param);
  store_halves(master, unless_nan(v, bits, all(0)));  // bits - (param << 16) modulo 2^16 is the lower half of bits
}

NNFAST_INLINE void write_stochastic(bf16* p, f32v v, uint32_t seed, uint32_t index) {
  bits_t r = exclusive_or(multiply(add(all(index), lane_numbers()), all(0x9e3779b1)), all(seed));
  r = multiply(exclusive_or(r, right<16>(r)), all(0x7feb352d));
  r = multiply(exclusive_or(r, right<15>(r)), all(0x846ca68b));
  const bits_t chance = right<16>(r);
  store_halves(p, unless_nan(v, right<16>(add(bits_of(v), chance)), all(0x7fc0)));
}

// The same for several registers, and for the tail of a run, which goes through a register's worth of stack.
template <class V>
NNFAST_INLINE V load_master(const bf16* p, const int16_t* master, Full<V>) {
  if constexpr (sizeof(V) == sizeof(f32v))
    return read_master(p, master);
  else {
    using Half = decltype(V::lo);
    return {load_master(p, master, Full<Half>{}), load_master(p + lanes<Half>, master + lanes<Half>, Full<Half>{})};
  }
}
template <class V>
NNFAST_INLINE void store_master(bf16* p, int16_t* master, V v, Full<V>) {
  if constexpr (sizeof(V) == sizeof(f32v))
    write_master(p, master, v);
  else {
    using Half = decltype(V::lo);
    store_master(p, master, v.lo, Full<Half>{});
    store_master(p + lanes<Half>, master + lanes<Half>, v.hi, Full<Half>{});
  }
}
template <class V>
NNFAST_INLINE void store_stochastic(bf16* p, V v, uint32_t seed, uint32_t index, Full<V>) {
  if constexpr (sizeof(V) == sizeof(f32v))
    write_stochastic(p, v, seed, index);
  else {
    using Half = decltype(V::lo);
    store_stochastic(p, v.lo, seed, index, Full<Half>{});
    store_stochastic(p + lanes<Half>, v.hi, seed, index + (uint32_t)lanes<Half>, Full<Half>{});
  }
}
NNFAST_INLINE f32v load_master(const bf16* p, const int16_t* master, Tail<f32v> t) {
  bf16 param[lanes<f32v>] = {};
  int16_t low[lanes<f32v>] = {};
  std::memcpy(param, p, t.n * sizeof(bf16));
  std::memcpy(low, master, t.n * sizeof(int16_t));
  return read_master(param, low);
}
NNFAST_INLINE void store_master(bf16* p, int16_t* master, f32v v, Tail<f32v> t) {
  bf16 param[lanes<f32v>];
  int16_t low[lanes<f32v>];
  write_master(param, low, v);
  std::memcpy(p, param, t.n * sizeof(bf16));
  std::memcpy(master, low, t.n * sizeof(int16_t));
}
NNFAST_INLINE void store_stochastic(bf16* p, f32v v, uint32_t seed, uint32_t index, Tail<f32v> t) {
  bf16 param[lanes<f32v>];
  write_stochastic(param, v, seed, index);
  std::memcpy(p, param, t.n * sizeof(bf16));
}

// ---- what the formulas read and write ----

// The gradient as the formulas want it. Once divided by grad_scale, it is also written back, as torch does.
template <class T, class Part>
NNFAST_INLINE auto read_grad(const StepTensor& t, T* g, Part part) {
  using V = typename Part::vec;
  V grad = load(g, part);
  if (t.grad_scale != 1) {
    grad = grad / V(t.grad_scale);
    store(g, grad, part);
  }
  if (t.maximize) grad = -grad;
  if (t.clip_coef != 1) grad = grad * V(t.clip_coef);
  return grad;
}

// The parameter's elements from `index` on; Exact: with their masters.
template <bool Exact, class T, class Part>
NNFAST_INLINE auto read_param(const StepTensor& t, int64_t index, Part part) {
  if constexpr (Exact)
    return load_master((const bf16*)t.param + index, t.master + index, part);
  else
    return load((const T*)t.param + index, part);
}
template <bool Exact, class T, class V, class Part>
NNFAST_INLINE void write_param(const StepTensor& t, int64_t index, V v, Part part) {
  if constexpr (Exact) {
    store_master((bf16*)t.param + index, t.master + index, v, part);
  } else {
    if constexpr (std::is_same_v<T, bf16>)
      if (t.stochastic) return store_stochastic((bf16*)t.param + index, v, t.seed, (uint32_t)index, part);
    store((T*)t.param + index, v, part);
  }
}

}  // namespace nnfast::NNFAST_ISA
