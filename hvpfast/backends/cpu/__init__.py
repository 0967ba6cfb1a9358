"""The CPU engine: hand-derived C++ kernels."""
