"""The published settings of the benchmarks."""
