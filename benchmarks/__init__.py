"""Benchmarks: never timed tests; each figure stands beside the bare alternative measured in the same run."""
