// The CPU kernels, built for AVX-512.
#define NNFAST_ISA avx512
#define NNFAST_NAME "avx512"
#define NNFAST_AVX512
#define NNFAST_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#include "isa.h"
