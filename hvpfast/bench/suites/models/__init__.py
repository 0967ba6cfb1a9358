"""Hessian-vector products of many models at once."""
