"""The CUDA engine: hand-derived CUDA C++ kernels."""
