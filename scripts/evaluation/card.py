"""The tables of scores in a model card, so that no figure in it is typed by hand."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.report import DISTANCES, runs_in

BEGIN, END = "<!-- scores, written by evaluate.py --record -->", "<!-- end of scores -->"


def update_card(file: Path, result: Mapping[str, Any]) -> bool:
    """Writes the tables between the card's two marks. Returns whether there is such a card."""
    card = file.read_text(encoding="utf-8") if file.is_file() else ""
    if BEGIN not in card or END not in card:
        return False
    tables = f"{BEGIN}\n\n{score_tables(result)}\n{END}"
    file.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: tables, card, flags=re.DOTALL), encoding="utf-8")
    return True


def score_tables(result: Mapping[str, Any]) -> str:
    """What `evaluate.py` found, in Markdown, each figure with its 95 % interval where it has one."""
    fidelity = [("set", *DISTANCES)]
    for name in result["pictures compared"]:
        fidelity.append((name, *(_figure(result[distance], name) for distance in DISTANCES)))
    decoded = [("reconstruction", "value")]
    for name, unit in (("reconstruction psnr", " dB"), ("reconstruction ssim", "")):
        kind = name.removeprefix("reconstruction ").upper()
        decoded += [(f"{kind}, {key}", _figure(result[name], key, unit)) for key in result[name]["intervals"]]
    tables = [*_accuracy(result), fidelity, decoded]
    return "\n".join(_table(rows) for rows in tables)


def _accuracy(result: Mapping[str, Any]) -> list[list[tuple[str, ...]]]:
    runs = runs_in(result)
    if not runs:
        return []
    about = f"{result['pictures']} held-out captions, {result['steps']} steps of {result['sampler']}"
    rows: list[tuple[str, ...]] = [(about, *runs)]
    rows.append(("**every attribute right**", *(_percent(run["accuracy"], run["interval"]) for run in runs.values())))
    for attribute in next(iter(runs.values()))["per attribute"]:
        shares = [(run["per attribute"][attribute], run["per attribute intervals"][attribute]) for run in runs.values()]
        rows.append((f"{attribute} right", *(_percent(*share) for share in shares)))
    controls = [("control: the judge reads every attribute from", "share")]
    controls += [(name, f"{100 * share:.1f} %") for name, share in result["controls"].items()]
    return [rows, controls]


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    head, *body = (f"| {' | '.join(row)} |\n" for row in rows)
    return head + "|---" * len(rows[0]) + "|\n" + "".join(body)


def _percent(share: float, interval: tuple[float, float]) -> str:
    return f"{100 * share:.1f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _figure(named: Mapping[str, Any], key: str, unit: str = "") -> str:
    value, (low, high) = named[key], named["intervals"][key]
    digits = 1 if abs(value) >= 2 else 2
    return f"{value:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"
