"""Eigenpairs of trained networks against SciPy and the peers."""
