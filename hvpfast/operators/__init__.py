"""Curvature matrices of models over data as linear operators."""
