"""The Triton kernels and the host code that launches them; imported only when asked for.

activations, losses, layers, products, probes: the kernels. tiles, launch, gemm: how an output is
cut up, run, or left to torch. network, linearization, tangents, third_order, penalty: the contract
for M models at once, in the names and equations of csrc/cpu. memory: what they allocate.
compilation: every kernel compiled ahead of time.
"""
