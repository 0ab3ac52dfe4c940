// The CPU kernels, built for AVX2.
#define NNFAST_ISA avx2
#define NNFAST_NAME "avx2"
#define NNFAST_TARGET "avx2,fma,f16c"
#include "isa.h"
