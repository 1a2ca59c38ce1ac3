"""The report of an evaluation: one HTML file with tables, plots and pictures that needs nothing from the net."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

LARGEST = 256  # pixels: larger pictures are shown reduced
SHOWN = 160  # CSS pixels of a picture's width
DISTANCES = ("fid", "kid", "precision", "recall")
STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --faint: #6b6b70; --line: #dcdce0; --paper: #fdfdfc; --bar: #0072b2;
  --card: #f4f4f2; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececee; --faint: #a0a0a8; --line: #3a3a40; --paper: #17171a;
  --bar: #5ab4f0; --card: #222226; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem; }
p { max-width: 46rem; } .faint, small { color: var(--faint); }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; } td small { display: block; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; display: block; } svg text { fill: var(--ink); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .9rem; }
.pairs { grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); }
figure { margin: 0; padding: .6rem; background: var(--card); border-radius: .4rem; }
figure div { display: flex; gap: .4rem; } figure div > * { flex: 1; min-width: 0; }
figure img { width: 100%; border-radius: .2rem; display: block; }
figcaption { font-size: .82rem; line-height: 1.35; margin-top: .35rem; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; font-size: .78rem; background: var(--card); padding: .8rem; border-radius: .4rem; }
"""


@dataclass(frozen=True)
class Card:
    """One picture, or several side by side, each with its label; below them the caption and what there is to say."""

    pictures: tuple[tuple[str, Image.Image], ...]
    caption: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gallery:
    title: str
    about: str
    cards: tuple[Card, ...]


def write_report(file: Path, title: str, result: Mapping[str, Any], galleries: Sequence[Gallery]) -> None:
    """Writes the page. `result` is what `evaluate.py` prints; each figure in it is shown with its interval."""
    settings = (
        f"{result['pictures']} prompts, picture i with seed i, none chosen or tried twice; {result['steps']} steps"
    )
    parts = [
        f"<h1>{escape(title)}</h1><p class=faint>{escape(settings)}, {escape(str(result['sampler']))}, "
        f"{result['size']} px. Small figures are 95 % intervals.</p>",
        *_accuracy(result),
        *_features(result),
        *_reconstruction(result),
        *_bits(result),
        *(_gallery(gallery) for gallery in galleries),
        "<h2>Everything measured</h2><details><summary>The result as JSON</summary>"
        f"<pre>{escape(json.dumps(result, indent=2))}</pre></details>",
    ]
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{escape(title)}</title>"
    page = (
        f"<!doctype html>\n<html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    file.write_text(page + "\n", encoding="utf-8")


def runs_in(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The caption accuracies in a result, each under the name of its guidance."""
    return {name: run for name, run in result.items() if isinstance(run, dict) and "per attribute" in run}


def _accuracy(result: Mapping[str, Any]) -> list[str]:
    if "controls" not in result:
        return []
    runs = runs_in(result)
    rows = [(name, _percent(run["accuracy"], run["interval"])) for name, run in runs.items()]
    wanted = {"real pictures": "100 %", "reconstructions": "the model's ceiling"}
    checks = [
        (f"control: {name}", _percent(value), wanted.get(name, "0 %")) for name, value in result["controls"].items()
    ]
    parts = [
        "<h2>Caption accuracy</h2><p>A picture is right if the judge, a detector trained on real pictures of this "
        "world, reads back every attribute that its caption states. The judge itself is checked on four kinds of "
        "pictures whose answer is known; what it read in the generated ones stands below them. Where all pictures "
        f"agree the bootstrap knows no width: none right of {result['pictures']} still allows "
        f"{300 / result['pictures']:.1f} %.</p>",
        _table(("", "right", "should be"), [*((*row, "") for row in rows), *checks]),
    ]
    for name, run in runs.items():
        intervals = run["per attribute intervals"]
        bars = [(key, value, intervals[key]) for key, value in run["per attribute"].items()]
        numbers = [(f"{n} stated ({of})", value, None) for n, (value, of) in run["per number of attributes"].items()]
        parts.append(f"<p><b>Attributes right, {escape(name)}</b></p>{_bars(bars, 1)}")
        parts.append(f"<p><b>Right by the number of stated attributes, {escape(name)}</b></p>{_bars(numbers, 1)}")
    return parts


ABBREVIATIONS = ("fid", "kid")
SCORES = ("inception-style score", "clip score")


def _features(result: Mapping[str, Any]) -> list[str]:
    network, there = result["features"], [name for name in SCORES if name in result]
    compared = result["pictures compared"].items()
    distances = [
        (key, f"{one} and {other}", *(_figure(result[name], key) for name in DISTANCES))
        for key, (one, other) in compared
    ]
    named = list(dict.fromkeys(key for name in there for key in result[name]["intervals"]))
    scores = [(key, *(_figure(result[name], key) for name in there)) for key in named]
    about = (
        f"Feature space: <b>{escape(network['network'])}</b>, {network['dimensions']} wide, pictures resized: "
        f"{escape(network['resize'])}, weights {escape(network['file'])} <small>sha256 {network['sha256']}</small>. "
        "Figures in other feature spaces do not compare. FID and KID: lower is better; read them beside those of two "
        "halves of the real pictures, whose smaller number makes their FID larger, and of the reconstructions, "
        "which no model of this autoencoder can be expected to beat. Precision and recall are of equally many "
        "pictures, k = 3; "
    )
    about += (
        f"the inception-style score tells apart {escape(network['classes'])}."
        if "classes" in network
        else "this network has no classes, so there is no inception-style score."
    )
    if "world" in result:
        share = network["variance explained by the background"]
        about += (
            f" The backgrounds alone explain {_percent(share)} of the variance of these features. The generated "
            "pictures have the captions of the real ones, so they may lie nearer to them than two halves, which share "
            "none. --features judge sees backgrounds first, --features judge-things sees things first."
        )
    fid = result["fid"]["intervals"]
    bars = [(key, result["fid"][key], fid[key]) for key in fid]
    return [
        f"<h2>In feature space</h2><p>{about}</p>",
        f"<div class=wide>{_table(('', 'pictures', *map(_title, DISTANCES)), distances)}</div>",
        _table(("", *there), scores) if there else "",
        f"<p><b>FID</b></p>{_bars(bars, max(high for _, _, (_, high) in bars))}",
    ]


def _reconstruction(result: Mapping[str, Any]) -> list[str]:
    found = {"PSNR in dB": result["reconstruction psnr"], "SSIM": result["reconstruction ssim"]}
    rows = [(f"{name}, {key}", _figure(each, key)) for name, each in found.items() for key in each["intervals"]]
    rows.append(("rFID", _figure(result["fid"], "real against reconstructions")))
    return ["<h2>Reconstructions of the autoencoder</h2>", _table(("", "mean over pictures"), rows)]


def _bits(result: Mapping[str, Any]) -> list[str]:
    if (bits := result.get("bits per dimension")) is None:
        return []
    return [
        f"<h2>Likelihood</h2><p>{escape(bits['bound'])}, of {bits['pictures']} real pictures.</p>",
        _table(("", bits["of"]), [("bits per dimension", _figure(bits, "mean"))]),
    ]


def _gallery(gallery: Gallery) -> str:
    kind = "cards pairs" if any(len(card.pictures) > 1 for card in gallery.cards) else "cards"
    cards = "".join(_card(card) for card in gallery.cards) or "<p class=faint>There are none.</p>"
    return f"<h2>{escape(gallery.title)}</h2><p>{escape(gallery.about)}</p><div class='{kind}'>{cards}</div>"


def _card(card: Card) -> str:
    images = "".join(
        f"<span><img src='{data_uri(image)}' alt='{escape(label or card.caption, quote=True)}' loading=lazy>"
        f"<small>{escape(label)}</small></span>"
        for label, image in card.pictures
    )
    notes = "".join(f"<br><small>{escape(note)}</small>" for note in card.notes)
    return f"<figure><div>{images}</div><figcaption>{escape(card.caption)}{notes}</figcaption></figure>"


def data_uri(image: Image.Image) -> str:
    """The picture as PNG inside an address; small ones are enlarged by a whole factor, so that nothing blurs."""
    if max(image.size) > LARGEST:
        image = image.copy()
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    elif (times := SHOWN // image.width) > 1:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells of `rows` are HTML, but for the first of each, and the head, which are text."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><td>{escape(first)}</td>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>" for first, *rest in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def _figure(group: Mapping[str, Any], key: str) -> str:
    if key not in group["intervals"]:
        return ""
    low, high = group["intervals"][key]
    return f"{group[key]:.4g}<small>{low:.4g} … {high:.4g}</small>"


def _title(name: str) -> str:
    return name.upper() if name in ABBREVIATIONS else name


def _percent(value: float, interval: Sequence[float] | None = None) -> str:
    around = "" if interval is None else f"<small>{100 * interval[0]:.1f} … {100 * interval[1]:.1f}</small>"
    return f"{100 * value:.1f} %{around}"


def _bars(bars: Sequence[tuple[str, float, Sequence[float] | None]], most: float) -> str:
    """A horizontal bar for each (name, value, interval), from 0 to `most`."""
    left, width, height = 270, 330, 22
    drawn = []
    for row, (name, value, interval) in enumerate(bars):
        y = row * height + height / 2

        def across(at: float) -> float:
            return left + width * min(max(at / most, 0), 1) if most > 0 else left

        drawn.append(f"<text x={left - 10} y={y + 4} text-anchor=end font-size=13>{escape(name)}</text>")
        drawn.append(f"<rect x={left} y={y - 6} width={across(value) - left:.1f} height=12 fill='var(--bar)'></rect>")
        if interval is not None:
            ends = [across(at) for at in interval]
            path = f"M{ends[0]:.1f} {y}H{ends[1]:.1f}M{ends[0]:.1f} {y - 4}v8M{ends[1]:.1f} {y - 4}v8"
            drawn.append(f"<path d='{path}' stroke='var(--ink)' fill=none></path>")
        figure = f"{100 * value:.1f} %" if most == 1 else f"{value:.4g}"
        drawn.append(f"<text x={left + width + 10} y={y + 4} font-size=13>{figure}</text>")
    view = f"0 0 {left + width + 80} {len(bars) * height}"
    return f"<svg viewBox='{view}' width={left + width + 80} role=img>{''.join(drawn)}</svg>"
