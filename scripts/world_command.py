"""The command line of the procedural worlds: OUT --count N [--seed S] [--size PIXELS] [--split train|heldout]."""

import argparse
from collections.abc import Callable
from pathlib import Path

from pipelines.errors import one_line_errors


def run(about: str, write_folder: Callable[[Path, int, int, str, int], None]) -> None:
    """Calls `write_folder(out, count, seed, split, size)` with what the command line says. `about` is the script's own
    docstring.
    """
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=64, help="pixels, width and height")
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    args = parser.parse_args()
    with one_line_errors():
        if args.count < 1 or args.size < 16:
            raise ValueError(f"count is {args.count} and size {args.size}; give at least 1 and 16")
        write_folder(args.out, args.count, args.seed, args.split, args.size)
