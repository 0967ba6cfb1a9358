// Functions for the CPU engine's vectors and for a GPU's threads alike.
#pragma once

#if defined(__CUDACC__)
#define HVPFAST_FN __host__ __device__ inline
#else
#define HVPFAST_FN inline __attribute__((always_inline))
#endif
