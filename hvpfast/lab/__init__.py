"""What studies and benchmarks stand on: runs, data, measures, reports, the environment."""
