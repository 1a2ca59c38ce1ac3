"""What `scripts/benchmark.py` times, against whom, and how the figures are made."""
