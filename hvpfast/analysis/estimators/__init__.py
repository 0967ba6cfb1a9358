"""Trace, Frobenius norm, diagonal and row norms: estimates with standard errors, exact values."""
