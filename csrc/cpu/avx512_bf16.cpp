// The CPU kernels, built for AVX-512 with its conversion from float to bfloat16, which takes a quarter of the
// instructions of the conversion without it, and with its products of pairs of bfloat16.
#define NNFAST_ISA avx512_bf16
#define NNFAST_NAME "avx512_bf16"
#define NNFAST_AVX512
#define NNFAST_AVX512_BF16
#define NNFAST_TARGET "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#include "isa.h"
