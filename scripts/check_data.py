"""Check a folder of captioned images before training on it: what would stop the training, and what would harm it.

    python scripts/check_data.py FOLDER [--size 64] [--sheet FILE.png] [--json FILE]

Every picture is opened as training opens it, and every caption is read by the tokenizer; nothing is changed. The last
line is the verdict. Exit code 0: training can start. Exit code 2: it cannot, and one line on stderr says why.
"""

import argparse
import hashlib
import io
import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from sheet import captioned
from tqdm import tqdm

from ldm.pictures import as_rgb
from ldm.training.data import DataConfig, open_dataset
from pipelines.errors import one_line, one_line_errors
from pipelines.json_files import read_json, write_json
from pipelines.loading import find_model
from pipelines.settings import words_in
from text_encoder import Tokenizer

METADATA = "metadata.jsonl"
THUMBNAIL = 8  # pixels
NEAR = 2.0  # levels of 255, RMS over thumbnails: a picture saved or scaled anew differs by less, another one by more
OBLONG = 2.0  # longer over shorter side, from which on training sees less than half of a picture
SHOWN = 5  # examples of each finding
SHEET = 48  # pictures on the sheet

STOPS = {
    "line that cannot be read": 'write each like {"file_name": "a.png", "text": "a caption"}',
    "missing picture": "put the file back, or delete its line",
    "unreadable picture": "save it anew, or delete it and its line",
    "caption that is no text": "write one, or delete the line",
}
"""What stops the training, and the mend."""
HARMS = {
    "empty caption": "say what the picture shows; until then it teaches no words",
    "caption that is cut": "shorten it: what is shown here is not read",
    "repeated caption": "say also what differs, if the pictures do",
    "small picture": "it is enlarged, and blurred: use a larger one, or train at a smaller size",
    "oblong picture": "training sees its middle square only: cut out what matters",
    "exact duplicate": "delete it and its line, or it is learned by heart",
    "near duplicate": "keep the better one",
    "picture without caption": f"add its line to {METADATA}, or it is not trained on",
}


class Finding(NamedTuple):
    """One case of a kind in `STOPS` or `HARMS`."""

    kind: str
    case: str


class Row(NamedTuple):
    """One row of the data: what its picture is called, where it is or its bytes, and its caption."""

    name: str
    source: Path | bytes
    caption: Any


class Picture(NamedTuple):
    """A picture that can be trained on."""

    name: str
    caption: str
    size: tuple[int, int]
    digest: str
    thumbnail: np.ndarray


@dataclass(frozen=True)
class Check:
    """All that was found out: the cases of each kind, the pictures, and some of them as training sees them."""

    rows: int
    found: dict[str, list[str]]
    pictures: list[Picture]
    shown: list[tuple[Image.Image, str]]


def read_rows(config: DataConfig) -> Iterator[Row | Finding]:
    """The rows of an imagefolder, also those that training would stumble over; of parquet and tars, all there are.

    Raises FileNotFoundError and ValueError as `open_dataset` does.
    """
    folder = Path(config.path)
    if any(folder.glob("*.parquet")) or any(folder.glob("*.tar")) or not (folder / METADATA).exists():
        for i, row in enumerate(open_dataset(config)):
            source = row[config.image_column]
            content = source["bytes"] if source["bytes"] is not None else Path(source["path"])
            yield Row(source["path"] or f"row {i}", content, row[config.caption_column])
        return
    listed = set()
    for file in sorted(folder.rglob(METADATA)):
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
                picture = Path(os.path.normpath(file.parent / fields["file_name"]))
                name = str(picture.relative_to(os.path.normpath(folder)))
            except (ValueError, KeyError, TypeError):  # no JSON, no file_name, or one that lies elsewhere
                yield Finding("line that cannot be read", f"line {number} of {file.relative_to(folder)}: {line[:60]}")
                continue
            listed.add(name)
            yield Row(name, picture, fields.get(config.caption_column))
    endings = Image.registered_extensions()
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in endings and (name := str(file.relative_to(folder))) not in listed:
            yield Finding("picture without caption", name)


def check_row(row: Row, config: DataConfig, tokenizer: Tokenizer) -> Iterator[Finding | tuple[Picture, Image.Image]]:
    """What is wrong with one row; then, if it can be trained on, its picture, and that as training sees it."""
    if not isinstance(row.caption, str):
        yield Finding("caption that is no text", f"{row.name}: {row.caption!r}")
    elif not row.caption.strip():
        yield Finding("empty caption", row.name)
    elif cut := tokenizer([row.caption]).cut[0]:
        yield Finding("caption that is cut", f"{row.name}: ... {cut[:60]}")
    try:
        content = row.source if isinstance(row.source, bytes) else row.source.read_bytes()
        image = as_rgb(Image.open(io.BytesIO(content)))
    except FileNotFoundError:
        yield Finding("missing picture", row.name)
        return
    except Exception as error:  # broken files make Pillow raise nearly anything
        fault = "no picture of a kind that is known" if isinstance(error, UnidentifiedImageError) else error
        yield Finding("unreadable picture", f"{row.name}: {fault}")
        return
    case = f"{row.name}: {image.width} x {image.height}"
    if min(image.size) < config.size:
        yield Finding("small picture", case)
    if max(image.size) > OBLONG * min(image.size):
        yield Finding("oblong picture", case)
    if isinstance(row.caption, str):
        seen = ImageOps.fit(image, (config.size, config.size), Image.Resampling.LANCZOS)
        thumbnail = np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), dtype=np.float32).ravel()
        digest = hashlib.sha256(content).hexdigest()
        yield Picture(row.name, row.caption, image.size, digest, thumbnail), seen


def find_duplicates(pictures: Sequence[Picture]) -> Iterator[Finding]:
    """Pictures like an earlier one: by their bytes, or by the RMS difference of thumbnails of 8 x 8 colours."""
    first: dict[str, Picture] = {}
    for picture in pictures:
        if picture is not (like := first.setdefault(picture.digest, picture)):
            yield Finding("exact duplicate", f"{picture.name}: of {like.name}")
    distinct = list(first.values())
    points = np.array([picture.thumbnail for picture in distinct])
    squares = (points**2).mean(1)
    for start in range(0, len(points), 1000):  # all pairs, a thousand rows of them at a time
        some = slice(start, start + 1000)
        distances = squares[some, None] + squares - 2 * points[some] @ points.T / points.shape[1]
        near = np.argwhere(np.tril(distances < NEAR**2, start - 1))
        for later, earlier in sorted(dict(near[::-1].tolist()).items()):  # each once, with the first that it is like
            yield Finding("near duplicate", f"{distinct[start + later].name}: of {distinct[earlier].name}")


def check(config: DataConfig) -> Check:
    """Everything that can be found out about the data behind `config`. Raises as `read_rows`."""
    tokenizer = Tokenizer.from_folder(find_model(None) / "tokenizer")
    found: dict[str, list[str]] = defaultdict(list)
    pictures: list[Picture] = []
    shown: list[tuple[Image.Image, str]] = []
    rng, rows = random.Random(0), 0
    for item in tqdm(read_rows(config), desc="checking", unit="picture", leave=False, disable=None):
        rows += isinstance(item, Row)
        for result in [item] if isinstance(item, Finding) else check_row(item, config, tokenizer):
            if isinstance(result, Finding):
                found[result.kind].append(result.case)
                continue
            picture, seen = result
            pictures.append(picture)
            place = len(shown) if len(shown) < SHEET else rng.randrange(len(pictures))  # each with the same chance
            if place < SHEET:
                shown[place : place + 1] = [(seen, picture.caption)]
    if pictures:
        for kind, case in find_duplicates(pictures):
            found[kind].append(case)
    repeated = Counter(picture.caption for picture in pictures).most_common()
    found["repeated caption"] = [f"{number} times: {text}" for text, number in repeated if number > 1 and text.strip()]
    return Check(rows, {kind: cases for kind, cases in found.items() if cases}, pictures, shown)


def fault_of(config: DataConfig, checked: Check) -> str | None:
    """Why training cannot start, on one line, or None."""
    from datasets.exceptions import DatasetsError

    if not checked.pictures:
        return f"none of {checked.rows} pictures in {config.path} can be trained on"
    if stops := {kind: cases for kind in STOPS if (cases := checked.found.get(kind))}:
        kinds = ", ".join(f"{kind} ({len(cases)})" for kind, cases in stops.items())
        return f"training would stop: {kinds}; the first is {next(iter(stops.values()))[0]}"
    try:
        rows = len(open_dataset(config))
    except (DatasetsError, ValueError) as error:
        return f"training would stop: {one_line(error.__cause__ or error)}"
    if rows != checked.rows:
        return f"training would read {rows} of {checked.rows} rows: look for file names that are odd or stand twice"
    return None


def histogram(sides: Sequence[int]) -> dict[str, int]:
    """How many lie between one power of two and the next: {"64 to 127": count}."""
    count = Counter(side.bit_length() for side in sides)
    edges = [2**power for power in range(min(count) - 1, max(count) + 1)] if count else []
    return {f"{low} to {high - 1}": count[low.bit_length()] for low, high in pairwise(edges)}


def summary(config: DataConfig, checked: Check) -> dict[str, Any]:
    """The figures of a check, for JSON."""
    captions = [picture.caption for picture in checked.pictures]
    words = Counter(word for caption in captions for word in words_in(caption))
    known = set(read_json(find_model(None) / "ldm.json").get("words", ()))
    return {
        "folder": config.path,
        "size": config.size,
        "rows": checked.rows,
        "trainable": len(captions),
        "shorter side": histogram([min(picture.size) for picture in checked.pictures]),
        "captions": {
            "distinct": len(set(captions)),
            "words each": round(sum(len(caption.split()) for caption in captions) / max(1, len(captions)), 1),
            "distinct words": len(words),
            "words new to the default model": sorted(set(words) - known, key=lambda word: (-words[word], word)),
        },
        "found": checked.found,
    }


def report(result: dict[str, Any]) -> Iterator[str]:
    """What a check found, for reading, line by line; the last is the verdict."""
    captions, spans = result["captions"], result["shorter side"]
    yield f"{result['folder']}: {result['rows']} pictures with captions"
    yield "shorter side in pixels:"
    for span, count in spans.items():
        yield f"  {span:>14} {count:>8}  {'#' * round(40 * count / max(spans.values()))}"
    new = captions["words new to the default model"]
    yield f"{captions['distinct']} different captions, of {captions['words each']} words on average"
    yield (
        f"{captions['distinct words']} different words, {len(new)} of them new to the default model"
        + (f": {', '.join(new[:8])}{' ...' * (len(new) > 8)}" if new else "")
    )
    for kind, mend in {**STOPS, **HARMS}.items():
        if cases := result["found"].get(kind):
            yield f"{kind} ({len(cases)}): {mend}"
            yield from (f"  {case}" for case in cases[:SHOWN])
            if len(cases) > SHOWN:
                yield f"  ... and {len(cases) - SHOWN} more"
    yield f"{result['trainable']} of {result['rows']} pictures can be trained on"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", help="images with metadata.jsonl, parquet files or WebDataset tars")
    parser.add_argument("--size", type=int, default=64, help="pixels that the model will be trained at")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--caption_column", default="text")
    parser.add_argument("--sheet", type=Path, help=f"file for a picture of {SHEET} of them with their captions")
    parser.add_argument("--json", type=Path, help="also write everything that is found to this file")
    args = parser.parse_args()
    with one_line_errors():
        if args.size < 8:
            raise ValueError(f"--size is {args.size}; give at least 8")
        columns = {"image_column": args.image_column, "caption_column": args.caption_column}
        config = DataConfig(path=args.folder, size=args.size, **columns)
        checked = check(config)
        result = summary(config, checked)
        if args.json is not None:
            write_json(args.json, result)
        if args.sheet is not None and checked.shown:
            images, captions = zip(*checked.shown, strict=True)
            captioned(images, captions, columns=8, side=128).save(args.sheet)
        print("\n".join(report(result)))
        if fault := fault_of(config, checked):
            raise ValueError(fault)


if __name__ == "__main__":
    main()
