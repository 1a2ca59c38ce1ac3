"""What imports what, and what importing does."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PILLARS = ("ldm", "autoencoder", "text_encoder")
PACKAGES = (*PILLARS, "pipelines")
MAY_IMPORT = {
    **{pillar: {pillar} for pillar in PILLARS},
    "pipelines": {*PACKAGES},
    "scripts": {*PACKAGES, "scripts"},
}
PREDICTIONS = {"eps", "x0", "v", "score", "epsilon", "v_prediction"}
KNOW_PREDICTIONS = {"ldm/prediction.py", "pipelines/scheduler_config.py"}  # the second is a folder's config


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


ALL_MODULES = [file for package in MAY_IMPORT for file in modules(package)]
SCRIPTS = {file.stem for file in modules("scripts")}


def nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file)))


def imported(file: Path) -> set[str]:
    """Those of our packages that a file imports, anywhere in it; a script counts as `scripts`."""
    names = set()
    for node in nodes(file):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            names.add(node.module or "")
    tops = {name.split(".")[0] for name in names}
    return {"scripts" if top in SCRIPTS else top for top in tops if top in SCRIPTS or top in MAY_IMPORT}


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_there_is_something_to_look_at() -> None:
    assert all(modules(package) for package in MAY_IMPORT)
    assert imported(ROOT / "pipelines" / "text_to_image.py") >= {"ldm", "pipelines"}
    assert "scripts" in imported(ROOT / "scripts" / "judge.py")


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports(package: str) -> None:
    found = {name_of(file): imported(file) - MAY_IMPORT[package] for file in modules(package)}
    assert {name: extra for name, extra in found.items() if extra} == {}


def test_tests_have_unique_names() -> None:
    names = [file.name for file in modules("tests") if file.name != "conftest.py"]
    assert len(names) == len(set(names))
    assert "__init__.py" not in names


def test_no_file_or_class_is_named_for_nothing() -> None:
    vague = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert [name_of(file) for file in ALL_MODULES if file.name in vague] == []
    classes = [node.name for file in ALL_MODULES for node in nodes(file) if isinstance(node, ast.ClassDef)]
    assert [name for name in classes if name.startswith("Base") or name.endswith(("Manager", "Mixin"))] == []


def strings(file: Path) -> Iterator[tuple[int, str]]:
    for node in nodes(file):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_predictions_are_named_in_one_file() -> None:
    found = [
        f"{name_of(file)}:{line}: {text}"
        for file in ALL_MODULES
        if name_of(file) not in KNOW_PREDICTIONS
        for line, text in strings(file)
        if text in PREDICTIONS
    ]
    assert found == []
    assert {text for _, text in strings(ROOT / "ldm" / "prediction.py")} >= PREDICTIONS


def test_the_latents_scale_lives_in_the_autoencoder() -> None:
    found = {
        name_of(file)
        for file in ALL_MODULES
        for node in nodes(file)
        if isinstance(node, ast.Constant) and node.value == 0.18215
    }
    assert found == {"autoencoder/model.py"}


WATCH = """
import sys
ROOT, seen = sys.argv[1], []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request"):
        seen.append(f"{event} {arguments}")
    elif event == "open" and str(arguments[0]).startswith(ROOT) and not str(arguments[0]).endswith((".py", ".pyc")):
        if "__pycache__" not in str(arguments[0]):
            seen.append(f"open {arguments[0]}")
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WATCH + code, str(ROOT)],
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_importing_prints_nothing_and_opens_nothing() -> None:
    """Each package is imported in turn, then every module in it that needs no extra."""
    code = f"""
import torch, pydantic, safetensors, tokenizers, PIL.Image, typer, tqdm  # their own doings are not ours
type("First", (pydantic.BaseModel,), {{}})  # pydantic reads entry points for its plugins at the first model
sys.addaudithook(watch)
for name in {PACKAGES}:
    __import__(name)
import pipelines.cli, pipelines.text_to_image
assert not seen, seen
assert not {{"diffusers", "transformers", "open_clip", "accelerate", "datasets"}} & sys.modules.keys()
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_command_line_starts_without_torch() -> None:
    code = """
sys.addaudithook(watch)
import pipelines, pipelines.cli
assert not seen, seen
assert not {"torch", "numpy", "PIL", "pydantic", "safetensors.torch"} & sys.modules.keys(), sorted(sys.modules)
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
