"""What `scripts/evaluate.py` measures, with which networks, and the page that it writes."""
