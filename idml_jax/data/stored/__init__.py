"""Data sets on disk: benchmarks, archives, layouts, record shards, and prepared sets."""
