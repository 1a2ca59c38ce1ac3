"""The page of an evaluation: whole in itself, well formed, nothing left unescaped; and the tables of the model card."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from evaluation import card, report
from evaluation.report import Card, Gallery
from PIL import Image

VOID = {"meta", "img", "br"}
RESULT: dict[str, Any] = {
    "pictures": 8,
    "size": 32,
    "steps": 2,
    "sampler": "ddim",
    "features": {"network": "<net>", "file": "net.safetensors", "sha256": "ab", "resize": "none", "dimensions": 3},
    "fid": {"feature network": "net", "real against real": 2.5, "intervals": {"real against real": [1.5, 3.5]}}
    | {"real against reconstructions": 0.5},
    "pictures compared": {"real against real": [4, 4]},
    "kid": {"real against real": 0.25, "intervals": {"real against real": [-0.1, 0.6]}},
    "precision": {"real against real": 1.0, "intervals": {"real against real": [1.0, 1.0]}},
    "recall": {"real against real": 0.5, "intervals": {"real against real": [0.25, 0.75]}},
    "reconstruction psnr": {"all pixels": 21.5, "intervals": {"all pixels": [20.0, 23.0]}},
    "reconstruction ssim": {"all pixels": 0.75, "intervals": {"all pixels": [0.7, 0.8]}},
}
RESULT["fid"]["intervals"]["real against reconstructions"] = [0.25, 0.75]


class Checker(HTMLParser):
    """Collects text and addresses, and fails on tags that do not close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page(tmp_path: Path, result: dict[str, Any], *galleries: Gallery) -> Checker:
    file = tmp_path / "report.html"
    report.write_report(file, "A <model>", result, galleries)
    content = file.read_text(encoding="utf-8")
    assert "http" not in content
    assert "<script" not in content
    assert "prefers-color-scheme: dark" in content
    checker = Checker()
    checker.feed(content)
    checker.close()
    assert checker.open == []
    assert all(address.startswith("data:image/png;base64,") for address in checker.addresses)
    return checker


def test_tables_and_plots(tmp_path: Path) -> None:
    found = page(tmp_path, RESULT)
    text = " ".join(found.texts)
    assert "A <model>" in text
    assert "<net>" in text
    assert "no inception-style score" in text
    assert "Caption accuracy" not in text
    assert "Likelihood" not in text
    for figure in ("2.5", "1.5 … 3.5", "0.25", "21.5", "0.7 … 0.8"):
        assert figure in found.texts
    assert "svg" in found.tags


def test_the_judge_stands_beside_its_score(tmp_path: Path) -> None:
    run = {"accuracy": 0.25, "interval": [0.1, 0.4], "per attribute": {"kind": 0.5}}
    run |= {"per attribute intervals": {"kind": [0.4, 0.6]}, "per number of attributes": {5: [0.125, 8]}}
    controls = {"real pictures": 0.99, "reconstructions": 0.9, "another picture's caption": 0.01, "noise": 0.0}
    judged = RESULT | {"controls": controls, "guidance 3": run}
    bits = {"bound": "Upper bound", "of": "bits per latent dimension", "pictures": 2, "mean": -0.5}
    found = page(tmp_path, judged | {"bits per dimension": bits | {"intervals": {"mean": [-0.75, -0.25]}}})
    for text in ("25.0 %", "10.0 … 40.0", "99.0 %", "90.0 %", "control: noise", "0.0 %", "12.5 %", "-0.5"):
        assert text in found.texts


def test_galleries_hold_their_pictures(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 32), "red")
    card = Card((("real", picture), ("18 dB", picture)), "a 'cat' & \"<dog>\"", ("read: nothing",))
    found = page(tmp_path, RESULT, Gallery("Worst", "By PSNR.", (card,)), Gallery("Right", "First.", ()))
    assert len(found.addresses) == 2
    assert "a 'cat' & \"<dog>\"" in found.texts
    assert "There are none." in found.texts
    (data,) = {re.sub("^data:image/png;base64,", "", address) for address in found.addresses}
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert shown.size == (160, 160)  # whole multiples keep their pixels
    assert shown.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("size", "shown"), [((64, 64), (128, 128)), ((200, 200), (200, 200)), ((1024, 512), (256, 128))]
)
def test_pictures_are_shown_at_a_reasonable_size(size: tuple[int, int], shown: tuple[int, int]) -> None:
    data = report.data_uri(Image.new("RGB", size)).partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == shown


def test_the_card_has_every_figure_with_its_interval_between_its_marks(tmp_path: Path) -> None:
    run = {"accuracy": 0.5, "interval": [0.25, 0.75], "per attribute": {"kind": 0.125}}
    run["per attribute intervals"] = {"kind": [0.0, 0.25]}
    result = RESULT | {"guidance 3": run, "controls": {"noise": 0.0}}
    file = tmp_path / "README.md"
    file.write_text(f"before\n{card.BEGIN}\n| old | 1 |\n{card.END}\nafter\n")
    assert card.update_card(file, result)
    text = file.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    for line in (
        "| 8 held-out captions, 2 steps of ddim | guidance 3 |",
        "| **every attribute right** | 50.0 % (25.0 to 75.0) |",
        "| kind right | 12.5 % (0.0 to 25.0) |",
        "| noise | 0.0 % |",
        "| real against real | 2.5 (1.5 to 3.5) | 0.25 (-0.10 to 0.60) | 1.00 (1.00 to 1.00) | 0.50 (0.25 to 0.75) |",
        "| PSNR, all pixels | 21.5 dB (20.0 to 23.0) |",
    ):
        assert line in text.splitlines()
    assert card.update_card(file, result)
    assert file.read_text() == text


def test_a_card_without_marks_is_left_alone(tmp_path: Path) -> None:
    assert not card.update_card(tmp_path / "README.md", RESULT)
    (tmp_path / "README.md").write_text("mine")
    assert not card.update_card(tmp_path / "README.md", RESULT)
    assert (tmp_path / "README.md").read_text() == "mine"
