"""Curvature logged while a network trains."""
