"""Loss landscapes: losses on planes and lines through a point of parameter space, and their plots.

    surface = hf.landscape.plane(model, loss_fn, None, data, seed=0, path="plane.npz")
    hf.landscape.contour({"baseline": surface, "regularised": other}).savefig("planes.png")

References:
    Goodfellow, Vinyals, Saxe (2015), arXiv:1412.6544; Li, Xu, Taylor, Studer, Goldstein (2018),
    arXiv:1712.09913.
"""

from hvpfast.analysis.landscape.plots import contour, curves, surface3d
from hvpfast.analysis.landscape.surface import Surface, load
from hvpfast.analysis.landscape.sweep import line, plane

__all__ = ["Surface", "contour", "curves", "line", "load", "plane", "surface3d"]
