"""What `python -m benchmarks.gpu` measures: parts, each in a process of its own."""
