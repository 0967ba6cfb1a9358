"""Registers, shared memory and spills of the GPU kernels."""
