"""What lies on disk: benchmarks, archives, layouts, shards of records, and the sets made of them."""
