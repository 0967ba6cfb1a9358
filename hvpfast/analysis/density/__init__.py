"""Spectral densities by stochastic Lanczos quadrature."""
