"""Exact tr H^2 and its gradient against probes and dense Hessians."""
