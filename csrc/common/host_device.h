// HVPFAST_FN marks functions of both the CPU engine's vectors and a GPU's threads.
#pragma once

#if defined(__CUDACC__)
#define HVPFAST_FN __host__ __device__ inline
#else
#define HVPFAST_FN inline __attribute__((always_inline))
#endif
