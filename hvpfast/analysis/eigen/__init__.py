"""Eigenpairs of curvature operators, and linear systems with them."""
