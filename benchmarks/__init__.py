"""Speed and memory of bytelm, beside those of ``transformers``; `python -m benchmarks --help`."""
