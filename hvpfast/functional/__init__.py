"""The functional layer: a loss linearized at one point, and what its curvature is applied to."""
