"""Random probes: Philox4x32-10 counters, the same bits wherever they are drawn."""
