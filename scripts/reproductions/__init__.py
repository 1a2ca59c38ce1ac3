"""The papers' tables and figures in the picturebook world, one file each; `scripts/reproduce.py` makes them."""
