"""Analyses of curvature: estimates, eigenpairs, spectral densities, loss landscapes, logs."""
