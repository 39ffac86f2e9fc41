"""Side by side with what people would use instead: `python -m benchmarks --help`, or `make bench`."""
