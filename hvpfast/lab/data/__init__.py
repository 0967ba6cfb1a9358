"""Data sets by name, from disk or made, and how they are split."""
