"""Runs: their folder, progress, configuration, and the processes that share them."""
