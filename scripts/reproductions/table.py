"""A table of a paper, made again cell by cell: what it is, how it is run and resumed, and what is written of it."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from judge import WEIGHTS
from tqdm import tqdm

from pipelines.errors import notice
from pipelines.json_files import write_json
from reproductions.measure import FIDS, real_against_real
from reproductions.plot import FAINT, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cell = tuple[str, str]
"""Row and column."""
Results = Mapping[Cell, Mapping[str, float]]
"""The figures of each cell by their metric."""
HERE = "here"
SAME_CAPTIONS = "Captions are those of the real pictures, so FID may fall below that of other real ones."


@dataclass(frozen=True)
class Setup:
    """What a run was asked for."""

    out: Path
    pictures: int
    training_steps: int


@dataclass(frozen=True)
class Paper:
    """A paper's own figures."""

    name: str
    citation: str
    results: Results
    apart: str
    """Why its figures are not to be compared with ours one by one."""


@dataclass(frozen=True)
class Claim:
    """Something that a table shows. `holds` raises KeyError where the cells that it looks at are not there."""

    text: str
    holds: Callable[[Results], bool]

    def verdict(self, results: Results) -> str:
        try:
            return "yes" if self.holds(results) else "no"
        except KeyError:
            return "-"


@dataclass(frozen=True)
class Table:
    title: str
    rows: str
    """What the rows are."""
    columns: str
    metrics: tuple[str, ...]
    cells: tuple[Cell, ...]
    papers: tuple[Paper, ...]
    claims: tuple[Claim, ...]
    panels: tuple[Callable[["Axes", Results], None], ...]
    """Plots of results; each is drawn for our figures and for every paper's."""
    measure: Callable[[Cell, Setup], dict[str, float]]
    seconds: Callable[[Sequence[Cell], Setup], float]
    """About how long cells will take, by measuring one pass through the network."""
    size: int
    """Pixels of the pictures."""
    pictures: int
    """How many pictures of each cell a full run makes."""
    training_steps: int = 0
    """Those of each model that a full run trains; 0 if the table trains none."""
    notes: tuple[str, ...] = ()
    weights: tuple[Path, ...] = field(default=())
    """Folders of the weights that the figures depend on, beside the judge's."""

    @property
    def row_names(self) -> list[str]:
        return list(dict.fromkeys(row for row, _ in self.cells))

    @property
    def column_names(self) -> list[str]:
        return list(dict.fromkeys(column for _, column in self.cells))

    def chosen(self, rows: Sequence[str] | None, columns: Sequence[str] | None) -> tuple[Cell, ...]:
        """The cells of these rows and columns; None means all.

        Raises:
            ValueError: a row or column that the table does not have.
        """
        for asked, kind, known in ((rows, self.rows, self.row_names), (columns, self.columns, self.column_names)):
            for name in asked or ():
                if name not in known:
                    raise ValueError(f"{kind}: {name} is not in this table; choose from {', '.join(known)}")
        return tuple(c for c in self.cells if (not rows or c[0] in rows) and (not columns or c[1] in columns))


def along(results: Results, metric: str, *, row: str | None = None, column: str | None = None) -> list[float]:
    """A metric along a row or column, in the table's order. Raises KeyError if there are fewer than two figures."""
    values = [
        figures[metric]
        for (at_row, at_column), figures in results.items()
        if (row in (None, at_row)) and (column in (None, at_column)) and metric in figures
    ]
    if len(values) < 2:
        raise KeyError(metric)
    return values


def rises(values: Sequence[float]) -> bool:
    """Whether the rank correlation (Spearman) of the values with their order is 0.9 or more.

    Of two to four values none may be out of order; of five, two neighbours may.
    """
    order = torch.tensor(values, dtype=torch.float64).argsort(stable=True).argsort().double()
    count = len(values)
    apart = (order - torch.arange(count)).square().sum().item()
    return 1 - 6 * apart / (count * (count**2 - 1)) >= 0.9 - 1e-9


def falls(values: Sequence[float]) -> bool:
    """`rises`, the other way."""
    return rises([-value for value in values])


def run(
    name: str, table: Table, setup: Setup, rows: Sequence[str] | None = None, columns: Sequence[str] | None = None
) -> tuple[list[Path], dict[str, Any]]:
    """Makes the cells that are not made yet, prints the table, and writes it as text, JSON and plot: files, numbers.

    Each cell is kept as a line of `OUT/NAME.jsonl` when it is done.

    Raises:
        ValueError: fewer than two pictures, no training steps, an unknown row or column, or a broken file of cells.
        OSError: `out` cannot be written.
    """
    if setup.pictures < 2:
        raise ValueError(f"pictures is {setup.pictures}, but FID needs 2 at the very least; 500 tell something")
    if table.training_steps and setup.training_steps < 1:
        raise ValueError(f"training-steps is {setup.training_steps}; give at least 1")
    cells = table.chosen(rows, columns)
    setup.out.mkdir(parents=True, exist_ok=True)
    kept, setting = setup.out / f"{name}.jsonl", _setting(table, setup)
    results = _finished(kept, setting)
    if missing := [cell for cell in cells if cell not in results]:
        hours = table.seconds(missing, setup) / 3600
        notice(f"{name}: {len(missing)} cells to make, about {hours:.2g} hours on {torch.get_num_threads()} cores")
    for cell in tqdm(missing, desc=name, unit="cell", disable=not missing):
        start = time.monotonic()
        results[cell] = table.measure(cell, setup)
        line = {"row": cell[0], "column": cell[1], "figures": results[cell], "seconds": time.monotonic() - start}
        with kept.open("a") as lines:
            lines.write(json.dumps({**line, **setting}) + "\n")
    ordered = {cell: results[cell] for cell in table.cells if cell in results}
    return _write(name, table, setup, ordered)


def fingerprint(*folders: Path) -> str:
    """Eight hexadecimal digits of all the weights in the folders themselves."""
    digest = hashlib.sha256()
    for file in (file for folder in folders for file in sorted(folder.glob("*.safetensors"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def _setting(table: Table, setup: Setup) -> dict[str, Any]:
    """What a cell's figures depend on, beside the cell."""
    steps = {"training_steps": setup.training_steps} if table.training_steps else {}
    return {"pictures": setup.pictures, **steps, "weights": fingerprint(WEIGHTS.parent, *table.weights)}


def _finished(kept: Path, setting: Mapping[str, Any]) -> dict[Cell, dict[str, float]]:
    """The cells in the file that were made under this setting."""
    results: dict[Cell, dict[str, float]] = {}
    for number, line in enumerate(kept.read_text().splitlines() if kept.exists() else (), 1):
        try:
            cell = json.loads(line)
            if all(cell.get(key) == value for key, value in setting.items()):
                results[cell["row"], cell["column"]] = cell["figures"]
        except (ValueError, AttributeError, KeyError):
            raise ValueError(f"{kept}: line {number} is no finished cell; delete it to have it made again") from None
    return results


def _write(name: str, table: Table, setup: Setup, results: Results) -> tuple[list[Path], dict[str, Any]]:
    sources: dict[str, Results] = {HERE: results, **{paper.name: paper.results for paper in table.papers}}
    verdicts = {claim.text: {at: claim.verdict(each) for at, each in sources.items()} for claim in table.claims}
    names = [name for name in FIDS if name in ("FID", *table.metrics)]
    floors = {name: real_against_real(setup.pictures, table.size, name) for name in names}
    notes = [
        *(
            f"Each {name} is of N = {setup.pictures} pictures of {table.size} px against as many real ones, in the "
            f"features {FIDS[name]}; that of as many other real ones is {mean:.4g}, give or take {spread:.2g}: "
            "differences below that tell little."
            for name, (mean, spread) in floors.items()
        ),
        *table.notes,
        *(
            f"{paper.name}: {paper.citation}. Not to be compared figure by figure: {paper.apart}."
            for paper in table.papers
        ),
    ]
    if table.training_steps:
        notes.insert(len(floors), f"What the table trains itself was trained for {setup.training_steps} steps.")
    text = "\n".join([table.title, "", *_grids(table, sources), *_verdict_lines(verdicts), "", *notes])
    print(text + "\n")
    files = [setup.out / f"{name}.{kind}" for kind in ("txt", "json", "png")]
    numbers = plain(
        {
            "title": table.title,
            **_setting(table, setup),
            "real against real": {
                name: {"mean": mean, "standard deviation": spread} for name, (mean, spread) in floors.items()
            },
            "figures": {at: _listed(each) for at, each in sources.items()},
            "claims": verdicts,
            "notes": notes,
        }
    )
    files[0].write_text(text + "\n", encoding="utf-8")
    write_json(files[1], numbers)
    draw(files[2], table, setup, sources, {name: mean for name, (mean, _) in floors.items()})
    return files, numbers


def _listed(results: Results) -> list[dict[str, Any]]:
    return [{"row": row, "column": column, **figures} for (row, column), figures in results.items()]


def _grids(table: Table, sources: Mapping[str, Results]) -> list[str]:
    """Each metric of each source as rows of text."""
    lines = []
    for metric in table.metrics:
        for at, results in sources.items():
            if not any(metric in figures for figures in results.values()):
                continue
            head = [f"{table.rows} \\ {table.columns}", *table.column_names]
            rows = [head]
            for row in table.row_names:
                values = [results.get((row, column), {}).get(metric) for column in table.column_names]
                if any(value is not None for value in values):
                    rows.append([row, *("-" if value is None else f"{value:.4g}" for value in values)])
            first, *others = [max(len(row[place]) for row in rows) for place in range(len(head))]
            lines += [f"{metric}, {at}"]
            for row in rows:
                cells = (f"{value:>{width + 3}}" for value, width in zip(row[1:], others, strict=True))
                lines.append(f"  {row[0]:<{first}}{''.join(cells)}")
            lines.append("")
    return lines


def _verdict_lines(verdicts: Mapping[str, Mapping[str, str]]) -> list[str]:
    names = list(next(iter(verdicts.values())))
    widths = [max(3, len(name)) + 2 for name in names]
    lines = ["Does the paper's shape reappear?  (-: not measured)"]
    lines.append("  " + "".join(f"{name:<{width}}" for name, width in zip(names, widths, strict=True)))
    for text, at in verdicts.items():
        lines.append("  " + "".join(f"{at[name]:<{width}}" for name, width in zip(names, widths, strict=True)) + text)
    return lines


def draw(file: Path, table: Table, setup: Setup, sources: Mapping[str, Results], floors: Mapping[str, float]) -> None:
    """One column of panels for each source, ours first; a panel that no paper has takes the whole row."""
    with figure(file, table.title, height=1.5 + 3.2 * len(table.panels)) as drawn:
        grid = drawn.subplots(len(table.panels), len(sources), squeeze=False)
        for panels, (at, results) in zip(grid.T, sources.items(), strict=True):
            for axes, panel in zip(panels, table.panels, strict=True):
                panel(axes, results)
                if not axes.has_data():
                    axes.set_axis_off()
            panels[0].set_title(f"{at}, N = {setup.pictures}" if at == HERE else at)
        for row, (ours, *papers) in enumerate(grid):
            if not any(axes.has_data() for axes in papers):
                ours.set_subplotspec(ours.get_gridspec()[row, :])
            floor, (low, high) = floors.get(ours.get_ylabel(), math.nan), ours.get_ylim()
            if low < floor < high:
                ours.axhline(floor, linestyle=":", color=FAINT, label="real against real")
        known = {}
        for axes in reversed(grid.flatten()):  # ours last, with the line that it alone has
            handles, labels = axes.get_legend_handles_labels()
            known |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in known}
        drawn.legend(known.values(), known.keys(), loc="outside lower center", ncols=max(1, len(known)))


def plain(value: Any) -> Any:
    """Numbers as JSON has them: six digits of each tensor's entries, None for what is not finite."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, str | int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
