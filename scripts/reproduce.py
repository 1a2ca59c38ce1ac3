"""The papers' figures and tables in the picturebook world, each made anew by one command.

    python scripts/reproduce.py schedules              noise schedules, posterior variances, the spectrum of x_t
    python scripts/reproduce.py ddim                   steps and eta (Song et al. 2020, table 1)
    python scripts/reproduce.py ddim-pixels            the same with a small model of pixels
    python scripts/reproduce.py guidance               w and p_uncond (Ho and Salimans 2022, table 1)
    python scripts/reproduce.py guidance-small         the same with small models trained from nothing
    python scripts/reproduce.py objectives             schedule and loss (Nichol and Dhariwal 2021, tables 1 and 2)
    python scripts/reproduce.py autoencoders           factor and discriminator (Rombach et al. 2022, table 8)
        [--out runs/reproduce] [--json] [--pictures N] [--training-steps N] [--rows ROW ...] [--columns COLUMN ...]

A table is printed with the paper's beside it, and whether the paper's shape reappears, claim by claim; it is written as
text, JSON and plot. How many hours it will take is said before it begins. The same command again goes on where it
stopped: finished cells are lines of `OUT/TABLE.jsonl`. With `--json` the last line has the numbers, null where one is
infinite or there is none. A quick look:

    python scripts/reproduce.py ddim --pictures 50 --columns 10 20
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from reproductions import autoencoders, ddim, guidance, objectives
from reproductions.schedules import schedules
from reproductions.table import Setup, Table, plain, run

from pipelines.errors import FAULT, one_line_errors

TABLES = {
    "ddim": ddim.LATENTS,
    "ddim-pixels": ddim.PIXELS,
    "guidance": guidance.TABLE,
    "guidance-small": guidance.SMALL,
    "objectives": objectives.TABLE,
    "autoencoders": autoencoders.TABLE,
}
Made = tuple[list[Path], dict[str, Any]]
"""The files that were written, and the numbers behind them."""


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(FAULT)


def make_table(name: str, table: Table) -> Callable[[argparse.Namespace], Made]:
    return lambda args: run(name, table, Setup(args.out, args.pictures, args.training_steps), args.rows, args.columns)


def parse() -> argparse.Namespace:
    shared = OneLineParser(add_help=False)
    shared.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder to write")
    shared.add_argument("--json", action="store_true", help="also print the numbers, as a last line")
    parser = OneLineParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="TABLE")
    about = "noise schedules, posterior variances, and the Fourier spectrum of x_t"
    command = commands.add_parser("schedules", parents=[shared], help=about, description=about)
    command.set_defaults(make=lambda args: schedules(args.out))
    for name, table in TABLES.items():
        command = commands.add_parser(name, parents=[shared], help=table.title, description=table.title)
        command.set_defaults(make=make_table(name, table))
        command.add_argument(
            "--pictures", type=int, default=table.pictures, help=f"N of each cell's FID; {table.pictures}"
        )
        command.add_argument("--rows", nargs="+", metavar="ROW", help=f"{table.rows}, of {', '.join(table.row_names)}")
        command.add_argument(
            "--columns", nargs="+", metavar="COLUMN", help=f"{table.columns}, of {', '.join(table.column_names)}"
        )
        if table.training_steps:
            command.add_argument(
                "--training-steps",
                type=int,
                default=table.training_steps,
                help=f"of each model; {table.training_steps}",
            )
        else:
            command.set_defaults(training_steps=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    with one_line_errors():
        files, numbers = args.make(args)
        for file in files:
            print(file)
        if args.json:
            print(json.dumps(plain(numbers)))


if __name__ == "__main__":
    main()
