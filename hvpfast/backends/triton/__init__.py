"""The Triton kernels and the host code that launches them; imported only when asked for.

state, tf32x3: the two backends. activations, losses, layers, products: the kernels. tiles, gemm:
how an output is cut into tiles, or left to torch. network, linearization, tangents, third_order,
penalty: the contract for M models at once, in the names and equations of csrc/cpu. memory: what
operations allocate. compilation: every kernel compiled ahead of time. Probes are drawn by
``backends/probes/triton.py``.
"""
