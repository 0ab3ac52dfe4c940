// How a formula is declared that serves a scalar, a SIMD register and a CUDA thread alike. Always inlined, so that
// it is compiled for the instruction set of whoever calls it and leaves no shared copy behind.
#pragma once

#ifdef __CUDACC__
#define NNFAST_FN __host__ __device__ __forceinline__
#else
#define NNFAST_FN inline __attribute__((always_inline))
#endif
