"""The benchmarks behind the numbers of README.md; they are not installed."""
