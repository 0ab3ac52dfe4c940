// The SIMD layer: a register of float or double in the instruction set that is being built, and several at once.
//
// Included once by each of avx2.cpp, avx512.cpp and avx512_bf16.cpp, in a namespace and a target of its own, so that
// the kernels above it are written once. Everything is inlined into them: a plain inline function compiled for
// AVX-512 could be the copy that the linker keeps for a CPU that has none.
#pragma once

#include "kernels.h"

namespace nnfast::NNFAST_ISA {

#ifndef NNFAST_NO_INLINE
#define NNFAST_INLINE static inline __attribute__((always_inline))
#define NNFAST_MEMBER inline __attribute__((always_inline))
#define NNFAST_LAMBDA __attribute__((always_inline))
#else
// For sanitizers, coverage and mutants: it compiles sooner, and each branch is counted once. Needs -march=native, for
// functions that are not inlined pass registers as arguments.
#define NNFAST_INLINE [[maybe_unused]] static
#define NNFAST_MEMBER
#define NNFAST_LAMBDA
#endif

// What the arithmetic of a stored type is done in.
template <class T>
struct acc {
  using type = float;
};
template <>
struct acc<double> {
  using type = double;
};
template <class T>
using acc_t = typename acc<T>::type;

// ---- registers ----

#ifdef NNFAST_AVX512
NNFAST_INLINE __m512 broadcast(float a) { return _mm512_set1_ps(a); }
NNFAST_INLINE __m512d broadcast(double a) { return _mm512_set1_pd(a); }
NNFAST_INLINE __m512i lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
#else
NNFAST_INLINE __m256 broadcast(float a) { return _mm256_set1_ps(a); }
NNFAST_INLINE __m256d broadcast(double a) { return _mm256_set1_pd(a); }
NNFAST_INLINE __m256i lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
#endif

// One register of A. The compilers' own vector types know + - * /; this gives them a namespace, so that the
// formulas of csrc/math find the functions below, and lets a scalar stand where a register is meant.
template <class A>
struct Vec {
  using scalar = A;
  using reg = decltype(broadcast(A{}));
  reg r;
  Vec() = default;
  NNFAST_MEMBER Vec(reg r) : r(r) {}
  NNFAST_MEMBER Vec(A a) : r(broadcast(a)) {}
  NNFAST_MEMBER operator reg() const { return r; }
  NNFAST_MEMBER friend Vec operator+(Vec a, Vec b) { return a.r + b.r; }
  NNFAST_MEMBER friend Vec operator-(Vec a, Vec b) { return a.r - b.r; }
  NNFAST_MEMBER friend Vec operator*(Vec a, Vec b) { return a.r * b.r; }
  NNFAST_MEMBER friend Vec operator/(Vec a, Vec b) { return a.r / b.r; }
  NNFAST_MEMBER friend Vec operator-(Vec a) { return -a.r; }
};
using f32v = Vec<float>;
using f64v = Vec<double>;

// Two of them side by side. A polynomial is one long chain of dependent steps: with several in step, the CPU has
// something to do while each waits.
template <class V>
struct Pair {
  using scalar = typename V::scalar;
  V lo, hi;
  Pair() = default;
  NNFAST_MEMBER Pair(V lo, V hi) : lo(lo), hi(hi) {}
  NNFAST_MEMBER Pair(scalar a) : lo(a), hi(a) {}
  NNFAST_MEMBER friend Pair operator+(Pair a, Pair b) { return {a.lo + b.lo, a.hi + b.hi}; }
  NNFAST_MEMBER friend Pair operator-(Pair a, Pair b) { return {a.lo - b.lo, a.hi - b.hi}; }
  NNFAST_MEMBER friend Pair operator*(Pair a, Pair b) { return {a.lo * b.lo, a.hi * b.hi}; }
  NNFAST_MEMBER friend Pair operator/(Pair a, Pair b) { return {a.lo / b.lo, a.hi / b.hi}; }
  NNFAST_MEMBER friend Pair operator-(Pair a) { return {-a.lo, -a.hi}; }
};
template <class A>
using Quad = Pair<Pair<Vec<A>>>;
template <class V>
constexpr int64_t lanes = sizeof(V) / sizeof(typename V::scalar);

// ---- a run of elements, part by part ----

// How many lanes of a V take part: all, or the first n, at the end of a run.
template <class V>
struct Full {
  using vec = V;
};
template <class V>
struct Tail {
  using vec = V;
  int64_t n;
};

// body(i, part) over [0, n): several registers at a time, then one, then the tail.
template <class A, class Wide = Quad<A>, class Body>
NNFAST_INLINE void sweep(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + lanes<Wide> <= n; i += lanes<Wide>) body(i, Full<Wide>{});
  for (; i + lanes<Vec<A>> <= n; i += lanes<Vec<A>>) body(i, Full<Vec<A>>{});
  if (i < n) body(i, Tail<Vec<A>>{n - i});
}

// Asks for the memory of a part before it is needed. Never faults.
template <class T, class V>
NNFAST_INLINE void prefetch(const T* p, Full<V>) {
  for (size_t line = 0; line < lanes<V> * sizeof(T); line += 64) _mm_prefetch((const char*)p + line, _MM_HINT_T0);
}
template <class T, class V>
NNFAST_INLINE void prefetch(const T* p, Tail<V>) {
  _mm_prefetch((const char*)p, _MM_HINT_T0);
}

// ---- what differs between the instruction sets ----

#ifdef NNFAST_AVX512
NNFAST_INLINE f32v widen(bf16, __m256i r) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(r), 16));
}
NNFAST_INLINE f32v widen(f16, __m256i r) { return _mm512_cvtph_ps(r); }
#ifdef NNFAST_AVX512_BF16
NNFAST_INLINE __m256i narrow(bf16, f32v v) { return (__m256i)_mm512_cvtneps_pbh(v); }
#else
// Round to nearest even: add half of what is cut off, and one more where the kept part is odd. NaN stays NaN.
NNFAST_INLINE __m256i narrow(bf16, f32v v) {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, _mm512_srli_epi32(r, 16), _mm512_set1_epi32(0x7fc0)));
}
#endif
NNFAST_INLINE __m256i narrow(f16, f32v v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

NNFAST_INLINE f32v load(const float* p, Full<f32v>) { return _mm512_loadu_ps(p); }
NNFAST_INLINE f64v load(const double* p, Full<f64v>) { return _mm512_loadu_pd(p); }
template <class T>
NNFAST_INLINE f32v load(const T* p, Full<f32v>) {
  return widen(T{}, _mm256_loadu_si256((const __m256i*)p));
}
// 1 for true.
NNFAST_INLINE f32v load(const bool* p, Full<f32v>) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
NNFAST_INLINE f32v load(const float* p, Tail<f32v> t) { return _mm512_maskz_loadu_ps((1u << t.n) - 1, p); }
NNFAST_INLINE f64v load(const double* p, Tail<f64v> t) { return _mm512_maskz_loadu_pd((1u << t.n) - 1, p); }
template <class T>
NNFAST_INLINE f32v load(const T* p, Tail<f32v> t) {
  return widen(T{}, _mm256_maskz_loadu_epi16((1u << t.n) - 1, p));
}
NNFAST_INLINE void store(float* p, f32v v, Full<f32v>) { _mm512_storeu_ps(p, v); }
NNFAST_INLINE void store(double* p, f64v v, Full<f64v>) { _mm512_storeu_pd(p, v); }
template <class T>
NNFAST_INLINE void store(T* p, f32v v, Full<f32v>) {
  _mm256_storeu_si256((__m256i*)p, narrow(T{}, v));
}
NNFAST_INLINE void store(float* p, f32v v, Tail<f32v> t) { _mm512_mask_storeu_ps(p, (1u << t.n) - 1, v); }
NNFAST_INLINE void store(double* p, f64v v, Tail<f64v> t) { _mm512_mask_storeu_pd(p, (1u << t.n) - 1, v); }
template <class T>
NNFAST_INLINE void store(T* p, f32v v, Tail<f32v> t) {
  _mm256_mask_storeu_epi16(p, (1u << t.n) - 1, narrow(T{}, v));
}
// Past the caches, to an address that is aligned to the store.
NNFAST_INLINE void stream(float* p, f32v v) { _mm512_stream_ps(p, v); }
NNFAST_INLINE void stream(double* p, f64v v) { _mm512_stream_pd(p, v); }
template <class T>
NNFAST_INLINE void stream(T* p, f32v v) {
  _mm256_stream_si256((__m256i*)p, narrow(T{}, v));
}
// The lanes that do not take part become zero.
NNFAST_INLINE f32v keep(f32v v, Tail<f32v> t) { return _mm512_maskz_mov_ps((1u << t.n) - 1, v); }
NNFAST_INLINE f64v keep(f64v v, Tail<f64v> t) { return _mm512_maskz_mov_pd((1u << t.n) - 1, v); }
// The lanes that do not take part become `rest`.
NNFAST_INLINE f32v keep(f32v v, Tail<f32v> t, f32v rest) { return _mm512_mask_mov_ps(rest, (1u << t.n) - 1, v); }
NNFAST_INLINE f64v keep(f64v v, Tail<f64v> t, f64v rest) { return _mm512_mask_mov_pd(rest, (1u << t.n) - 1, v); }

// The sum and the largest of the lanes.
NNFAST_INLINE float sum(f32v v) { return _mm512_reduce_add_ps(v); }
NNFAST_INLINE double sum(f64v v) { return _mm512_reduce_add_pd(v); }
NNFAST_INLINE float largest(f32v v) { return _mm512_reduce_max_ps(v); }
NNFAST_INLINE double largest(f64v v) { return _mm512_reduce_max_pd(v); }
NNFAST_INLINE f32v sqrt(f32v v) { return _mm512_sqrt_ps(v); }
NNFAST_INLINE f64v sqrt(f64v v) { return _mm512_sqrt_pd(v); }
NNFAST_INLINE f32v abs(f32v v) { return _mm512_abs_ps(v); }
NNFAST_INLINE f32v round(f32v v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
NNFAST_INLINE f64v round(f64v v) { return _mm512_roundscale_pd(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// v 2^n, with overflow to infinity and underflow to zero.
NNFAST_INLINE f32v scale2(f32v v, f32v n) { return _mm512_scalef_ps(v, n); }
NNFAST_INLINE f64v scale2(f64v v, f64v n) { return _mm512_scalef_pd(v, n); }
// The smaller or the larger of a limit and x; a NaN in x stays, because the instruction then gives its second operand.
NNFAST_INLINE f32v at_most(f32v limit, f32v x) { return _mm512_min_ps(limit, x); }
NNFAST_INLINE f32v at_least(f32v limit, f32v x) { return _mm512_max_ps(limit, x); }
NNFAST_INLINE f64v at_least(f64v limit, f64v x) { return _mm512_max_pd(limit, x); }
// x < 0 ? a : b
NNFAST_INLINE f32v blend_negative(f32v x, f32v a, f32v b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), b, a);
}
// The larger one, or NaN where either is. A NaN in b stays as x's above, so only a is looked at.
NNFAST_INLINE f32v maximum(f32v a, f32v b) {
  return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}
NNFAST_INLINE f64v maximum(f64v a, f64v b) {
  return _mm512_mask_mov_pd(_mm512_max_pd(a, b), _mm512_cmp_pd_mask(a, a, _CMP_UNORD_Q), a);
}
#else
NNFAST_INLINE f32v widen(bf16, __m128i r) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(r), 16));
}
NNFAST_INLINE f32v widen(f16, __m128i r) { return _mm256_cvtph_ps(r); }
// As for AVX-512. The two halves of packus are 128 bits apart: permute brings them together.
NNFAST_INLINE __m128i narrow(bf16, f32v v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i w = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(w, w), 0x08));
}
NNFAST_INLINE __m128i narrow(f16, f32v v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

NNFAST_INLINE f32v load(const float* p, Full<f32v>) { return _mm256_loadu_ps(p); }
NNFAST_INLINE f64v load(const double* p, Full<f64v>) { return _mm256_loadu_pd(p); }
template <class T>
NNFAST_INLINE f32v load(const T* p, Full<f32v>) {
  return widen(T{}, _mm_loadu_si128((const __m128i*)p));
}
// 1 for true.
NNFAST_INLINE f32v load(const bool* p, Full<f32v>) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
NNFAST_INLINE void store(float* p, f32v v, Full<f32v>) { _mm256_storeu_ps(p, v); }
NNFAST_INLINE void store(double* p, f64v v, Full<f64v>) { _mm256_storeu_pd(p, v); }
template <class T>
NNFAST_INLINE void store(T* p, f32v v, Full<f32v>) {
  _mm_storeu_si128((__m128i*)p, narrow(T{}, v));
}
NNFAST_INLINE void stream(float* p, f32v v) { _mm256_stream_ps(p, v); }
NNFAST_INLINE void stream(double* p, f64v v) { _mm256_stream_pd(p, v); }
template <class T>
NNFAST_INLINE void stream(T* p, f32v v) {
  _mm_stream_si128((__m128i*)p, narrow(T{}, v));
}
// Tails: masked loads, for a register that was just put together in memory is slow to load; stores by powers of two,
// for masked ones take dozens of instructions on AMD. AVX2 has no masked access to 16 bits.
NNFAST_INLINE __m256i mask_of(Tail<f32v> t) { return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)t.n), lane_numbers()); }
NNFAST_INLINE __m256i mask_of(Tail<f64v> t) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(t.n), _mm256_setr_epi64x(0, 1, 2, 3));
}
NNFAST_INLINE f32v load(const float* p, Tail<f32v> t) { return _mm256_maskload_ps(p, mask_of(t)); }
NNFAST_INLINE f64v load(const double* p, Tail<f64v> t) { return _mm256_maskload_pd(p, mask_of(t)); }
template <class T>
NNFAST_INLINE f32v load(const T* p, Tail<f32v> t) {
  int64_t four = 0, rest = 0;  // of 16 bits each
  if (t.n & 4) std::memcpy(&four, p, 8), p += 4;
  if (t.n & 2) std::memcpy(&rest, p, 4);
  if (t.n & 1) rest |= (int64_t)p[t.n & 2].bits << 16 * (t.n & 2);
  return widen(T{}, t.n & 4 ? _mm_set_epi64x(rest, four) : _mm_set_epi64x(0, rest));
}
NNFAST_INLINE void store(float* p, f32v v, Tail<f32v> t) {
  __m128 left = _mm256_castps256_ps128(v);
  if (t.n & 4) {
    _mm_storeu_ps(p, left);
    p += 4;
    left = _mm256_extractf128_ps(v, 1);
  }
  if (t.n & 2) {
    _mm_storel_pi((__m64*)p, left);
    p += 2;
    left = _mm_movehl_ps(left, left);
  }
  if (t.n & 1) _mm_store_ss(p, left);
}
NNFAST_INLINE void store(double* p, f64v v, Tail<f64v> t) {
  __m128d left = _mm256_castpd256_pd128(v);
  if (t.n & 2) {
    _mm_storeu_pd(p, left);
    p += 2;
    left = _mm256_extractf128_pd(v, 1);
  }
  if (t.n & 1) _mm_store_sd(p, left);
}
template <class T>
NNFAST_INLINE void store(T* p, f32v v, Tail<f32v> t) {
  __m128i left = narrow(T{}, v);
  if (t.n & 4) {
    _mm_storel_epi64((__m128i*)p, left);
    p += 4;
    left = _mm_srli_si128(left, 8);
  }
  const int64_t rest = _mm_cvtsi128_si64(left);
  if (t.n & 2) std::memcpy(p, &rest, 4);
  if (t.n & 1) p[t.n & 2].bits = (uint16_t)(rest >> 16 * (t.n & 2));
}
NNFAST_INLINE f32v keep(f32v v, Tail<f32v> t) { return _mm256_and_ps(v, _mm256_castsi256_ps(mask_of(t))); }
NNFAST_INLINE f64v keep(f64v v, Tail<f64v> t) { return _mm256_and_pd(v, _mm256_castsi256_pd(mask_of(t))); }
NNFAST_INLINE f32v keep(f32v v, Tail<f32v> t, f32v rest) {
  return _mm256_blendv_ps(rest, v, _mm256_castsi256_ps(mask_of(t)));
}
NNFAST_INLINE f64v keep(f64v v, Tail<f64v> t, f64v rest) {
  return _mm256_blendv_pd(rest, v, _mm256_castsi256_pd(mask_of(t)));
}

NNFAST_INLINE float sum(f32v v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
NNFAST_INLINE double sum(f64v v) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
NNFAST_INLINE float largest(f32v v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
NNFAST_INLINE double largest(f64v v) {
  const __m128d s = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(s, _mm_unpackhi_pd(s, s)));
}
NNFAST_INLINE f32v sqrt(f32v v) { return _mm256_sqrt_ps(v); }
NNFAST_INLINE f64v sqrt(f64v v) { return _mm256_sqrt_pd(v); }
NNFAST_INLINE f32v abs(f32v v) { return _mm256_andnot_ps(f32v(-0.0f), v); }
NNFAST_INLINE f32v round(f32v v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
NNFAST_INLINE f64v round(f64v v) { return _mm256_round_pd(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
NNFAST_INLINE f32v at_most(f32v limit, f32v x) { return _mm256_min_ps(limit, x); }
NNFAST_INLINE f32v at_least(f32v limit, f32v x) { return _mm256_max_ps(limit, x); }
NNFAST_INLINE f64v at_least(f64v limit, f64v x) { return _mm256_max_pd(limit, x); }
// v 2^n for n from -127, counted as 2^-127 = 0, to 128, where 2^128 is infinity.
NNFAST_INLINE f32v scale2(f32v v, f32v n) {
  n = at_most(128.0f, at_least(-127.0f, n));
  const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return v * f32v(_mm256_castsi256_ps(e));
}
// The same for n from -1023, counted as 2^-1023 = 0, to 1023.
NNFAST_INLINE f64v scale2(f64v v, f64v n) {
  n = _mm256_max_pd(_mm256_set1_pd(-1023.0), n);
  const __m256i e = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n)), _mm256_set1_epi64x(1023));
  return v * f64v(_mm256_castsi256_pd(_mm256_slli_epi64(e, 52)));
}
// blendv looks at the sign bit alone: -0 counts as negative, which no caller can tell.
NNFAST_INLINE f32v blend_negative(f32v x, f32v a, f32v b) { return _mm256_blendv_ps(b, a, x); }
NNFAST_INLINE f32v maximum(f32v a, f32v b) {
  return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
NNFAST_INLINE f64v maximum(f64v a, f64v b) {
  return _mm256_blendv_pd(_mm256_max_pd(a, b), a, _mm256_cmp_pd(a, a, _CMP_UNORD_Q));
}
#endif

// ---- the same for several registers ----

template <class T, class V>
NNFAST_INLINE Pair<V> load(const T* p, Full<Pair<V>>) {
  return {load(p, Full<V>{}), load(p + lanes<V>, Full<V>{})};
}
#ifdef NNFAST_AVX512
// Each word goes straight to the upper half of its lane, and zero below it.
NNFAST_INLINE Pair<f32v> load(const bf16* p, Full<Pair<f32v>>) {
  const __m512i lower = _mm512_set_epi16(
      15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
  const __m512i r = _mm512_loadu_si512(p);
  return {
      f32v(_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, lower, r))),
      f32v(_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, upper, r)))};
}
#endif
template <class T, class V>
NNFAST_INLINE void store(T* p, Pair<V> v, Full<Pair<V>>) {
  store(p, v.lo, Full<V>{});
  store(p + lanes<V>, v.hi, Full<V>{});
}
#ifdef NNFAST_AVX512_BF16
// Two registers of float make a whole one of bfloat16, in one instruction.
NNFAST_INLINE void store(bf16* p, Pair<f32v> v, Full<Pair<f32v>>) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(v.hi, v.lo));
}
NNFAST_INLINE void stream(bf16* p, Pair<f32v> v) {
  _mm512_stream_si512((__m512i*)p, (__m512i)_mm512_cvtne2ps_pbh(v.hi, v.lo));
}
#endif
template <class T, class V>
NNFAST_INLINE void stream(T* p, Pair<V> v) {
  stream(p, v.lo);
  stream(p + lanes<V>, v.hi);
}
// As store, and past the caches where `past` says so; p + any multiple of a part is then aligned (see may_stream).
template <class T, class V>
NNFAST_INLINE void store(T* p, V v, Full<V> part, bool past) {
  if (past)
    stream(p, v);
  else
    store(p, v, part);
}
template <class T, class V>
NNFAST_INLINE void store(T* p, V v, Tail<V> part, bool) {
  store(p, v, part);
}
template <class V>
NNFAST_INLINE V keep(V v, Full<V>) {
  return v;
}
template <class V>
NNFAST_INLINE V keep(V v, Full<V>, V) {
  return v;
}
#define NNFAST_PAIRWISE1(f)            \
  template <class V>                   \
  NNFAST_INLINE Pair<V> f(Pair<V> a) { \
    return {f(a.lo), f(a.hi)};         \
  }
#define NNFAST_PAIRWISE2(f)                       \
  template <class V>                              \
  NNFAST_INLINE Pair<V> f(Pair<V> a, Pair<V> b) { \
    return {f(a.lo, b.lo), f(a.hi, b.hi)};        \
  }
NNFAST_PAIRWISE1(sqrt)
NNFAST_PAIRWISE1(abs)
NNFAST_PAIRWISE1(round)
NNFAST_PAIRWISE2(scale2)
NNFAST_PAIRWISE2(at_most)
NNFAST_PAIRWISE2(at_least)
NNFAST_PAIRWISE2(maximum)
template <class V>
NNFAST_INLINE Pair<V> blend_negative(Pair<V> x, Pair<V> a, Pair<V> b) {
  return {blend_negative(x.lo, a.lo, b.lo), blend_negative(x.hi, a.hi, b.hi)};
}
template <class V>
NNFAST_INLINE typename V::scalar sum(Pair<V> v) {
  return sum(v.lo + v.hi);
}

// v as it will be when it is read back from a T.
template <class T>
NNFAST_INLINE f32v rounded(f32v v) {
  if constexpr (sizeof(T) == 2)
    return widen(T{}, narrow(T{}, v));
  else
    return v;
}
template <class T, class V>
NNFAST_INLINE Pair<V> rounded(Pair<V> v) {
  return {rounded<T>(v.lo), rounded<T>(v.hi)};
}

// A sum over a run: as many registers as a sweep hands out at a time, which take in a single one too.
template <class A, class Wide = Quad<A>>
struct Sum {
  Wide s;
  NNFAST_MEMBER Sum() : s(A(0)) {}
  NNFAST_MEMBER void operator+=(Wide v) { s = s + v; }
  NNFAST_MEMBER void operator+=(Vec<A> v) { first(s) = first(s) + v; }
  NNFAST_MEMBER A total() const { return sum(s); }

 private:
  static NNFAST_MEMBER Vec<A>& first(Vec<A>& v) { return v; }
  template <class V>
  static NNFAST_MEMBER Vec<A>& first(Pair<V>& v) {
    return first(v.lo);
  }
};

// ---- from a run-time dtype to a type: body(T{}), and body(T{}, W{}) where W may be float for a 16-bit T ----

template <class Body>
NNFAST_INLINE void visit(DType t, Body body) {
  switch (t) {
    case DType::f32: return body(float{});
    case DType::f64: return body(double{});
    case DType::bf16: return body(bf16{});
    case DType::f16: return body(f16{});
  }
}
template <class Body>
NNFAST_INLINE void visit(DType t, DType w, Body body) {
  visit(t, [&](auto e) {
    if constexpr (sizeof(e) == 2)
      if (w == DType::f32) return body(e, float{});
    return body(e, e);
  });
}

}  // namespace nnfast::NNFAST_ISA
