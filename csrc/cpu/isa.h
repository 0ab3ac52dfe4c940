// One instruction set's build of every CPU kernel: avx2.cpp, avx512.cpp and avx512_bf16.cpp set the target and include
// this.
//
// The target is switched on here, after the system's headers, and not by a compiler flag: whatever those headers
// define inline stays code for any CPU, and the linker can mix up nothing.
#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define NNFAST_PRAGMA_(x) _Pragma(#x)
#define NNFAST_PRAGMA(x) NNFAST_PRAGMA_(x)
#ifdef __clang__
NNFAST_PRAGMA(clang attribute push(__attribute__((target(NNFAST_TARGET))), apply_to = function))
#else
#pragma GCC push_options
NNFAST_PRAGMA(GCC target(NNFAST_TARGET))
#endif

#include "adamw.h"
#include "attention_backward.h"
#include "clip_grad.h"
#include "cross_entropy.h"
#include "gemm.h"
#include "layer_norm.h"
#include "linear.h"
#include "linear_gelu.h"
#include "rmsprop.h"
#include "sgd.h"

namespace nnfast::NNFAST_ISA {
extern const Kernels kernels = {
    .name = NNFAST_NAME,
    .avx512 = sizeof(f32v) == 64,
    .layer_norm = layer_norm_fwd,
    .layer_norm_backward = layer_norm_bwd,
    .gelu = gelu_fwd,
    .gelu_backward = gelu_bwd,
    .cross_entropy = cross_entropy_fwd,
    .cross_entropy_backward = cross_entropy_bwd,
    .sum_rows = sum_rows,
    .move_sums = move_sums,
    .sum_parts = sum_parts,
    .adamw = adamw,
    .sgd = sgd,
    .rmsprop = rmsprop,
    .sum_of_squares = sum_of_squares,
    .largest = largest,
    .scale = scale,
    .gemm_rows = kTileRows,
    .gemm_columns = kPanel,
    .gemm_pack = gemm_pack,
    .gemm = gemm,
    .attention = attention,
    .attention_scratch = attention_scratch,
};
}  // namespace nnfast::NNFAST_ISA

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
