"""Side by side with peers, in one run: `python -m benchmarks`. Ratios count, not single figures."""
