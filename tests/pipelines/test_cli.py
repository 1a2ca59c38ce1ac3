import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

import pipelines
from pipelines import TextToImagePipeline, cli, errors, one_prompt
from pipelines.png import read_record

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `ldm render` in an empty folder with the tiny model: (exit code, stdout, stderr)."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments: str, model: Path = model_folder) -> tuple[int, str, str]:
        shared = ["--model", str(model), "--steps", "1", "--device", "cpu", "--dtype", "float32"]
        code = exit_code(["render", *shared, *arguments])
        return code, *capsys.readouterr()

    return call


def exit_code(arguments: list[str]) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)


def test_a_prompt_becomes_a_picture(run: Run) -> None:
    code, out, err = run("A red house, under a yellow sun!")
    assert (code, out, err) == (0, "a-red-house-under-a-yellow-sun-0.png\n", "")
    with Image.open(out.strip()) as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")


def test_a_file_named_after_the_prompt_is_never_replaced(run: Run) -> None:
    assert [run("a house", "--seed", "7")[1] for _ in range(3)] == [
        "a-house-7.png\n",
        "a-house-7-1.png\n",
        "a-house-7-2.png\n",
    ]
    assert run("???")[1] == "picture-0.png\n"
    assert run("x" * 200)[1] == "x" * 60 + "-0.png\n"


def test_a_named_file_is_replaced(run: Run) -> None:
    Path("x.png").write_bytes(b"former")
    assert run("a house", "-o", "x.png") == (0, "x.png\n", "")
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")
    assert os.listdir() == ["x.png"]


def test_several_pictures_have_their_own_seeds_and_names(run: Run) -> None:
    assert run("a house", "-n", "2", "--seed", "3", "-o", "x.png")[1] == "x-0.png\nx-1.png\n"
    assert run("a house", "-n", "2", "--seed", "3")[1] == "a-house-3.png\na-house-4.png\n"
    assert run("a house", "--seed", "4", "-o", "alone.png")[0] == 0
    assert [read_record(Path(f"x-{index}.png"))["seed"] for index in range(2)] == [3, 4]
    alone, second = (Image.open(path).tobytes() for path in ("alone.png", "x-1.png"))
    assert max(abs(one - two) for one, two in zip(alone, second, strict=True)) <= 1


def test_pictures_are_written_batch_by_batch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that those there are stay if the rest is interrupted; what there is to say is said once for all."""
    monkeypatch.setattr(one_prompt, "BATCH", 2)
    options = "a house", "-n", "3", "--seed", "5", "--width", "96"
    code, out, err = run(*options, "-o", "x.png", "--json")
    *paths, last = out.splitlines()
    assert (code, paths) == (0, ["x-0.png", "x-1.png", "x-2.png"])
    assert err == "notice: 96x64 is far from the 64x64 that the model was trained at\n"
    assert json.loads(last)["pictures"] == [{"path": path, "seed": 5 + i} for i, path in enumerate(paths)]
    assert [read_record(Path(path))["seed"] for path in paths] == [5, 6, 7]

    render, calls = TextToImagePipeline.__call__, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return render(*args, **kwargs)

    monkeypatch.setattr(TextToImagePipeline, "__call__", interrupted)
    code, out, _ = run(*options, "-o", "y.png")
    assert (code, out, calls) == (130, "y-0.png\ny-1.png\n", [5, 7])
    assert [Path(f"y-{i}.png").read_bytes() == Path(f"x-{i}.png").read_bytes() for i in range(2)] == [True, True]


def test_the_record_says_how_the_picture_was_made(run: Run, model_folder: Path) -> None:
    options = ["--negative", "blue", "--guidance", "3", "--rescale", "0.5", "--eta", "0.25", "--sampler", "ddim"]
    code, out, _ = run("a house", "-o", "x.png", "--json", "--width", "72", "--height", "56", *options)
    assert code == 0
    path, last = out.splitlines()
    record, line = read_record(Path("x.png")), json.loads(last)
    assert path == "x.png"
    assert line.pop("pictures") == [{"path": "x.png", "seed": 0}]
    assert line.pop("seconds") > 0
    assert {**line, "seed": 0} == record
    assert len(record.pop("sha256")) == len(record.pop("configs_sha256")) == 64
    assert record == {
        "prompt": "a house",
        "negative": "blue",
        "seed": 0,
        "steps": 1,
        "guidance": 3.0,
        "rescale": 0.5,
        "sampler": "ddim",
        "eta": 0.25,
        "width": 72,
        "height": 56,
        "syntax": "plain",
        "clip_skip": 0,
        "tiled": False,
        "spacing": "leading",
        "guidance_interval": None,
        "reuse": 1,
        "merge_tokens": 0.0,
        "strength": None,
        "init": None,
        "mask": None,
        "loras": [],
        "model": "tiny",
        "prediction": "epsilon",
        "ema": False,
        "batch": 1,
        "dtype": "float32",
        "device": "cpu",
        "versions": {"ldm": pipelines.__version__, "torch": torch.__version__},
    }
    with Image.open("x.png") as image:
        assert image.size == (72, 56)


def test_a_single_file_renders_what_its_folder_does(run: Run, model_folder: Path) -> None:
    file = Path("tiny.safetensors")
    assert exit_code(["convert", str(model_folder), str(file)]) == 0
    run("a house", "-o", "x.png")
    code, out, err = run("a house", "-o", "y.png", model=file)
    assert (code, out) == (0, "y.png\n")
    assert err == (
        "notice: tiny.safetensors: prediction type epsilon (scheduler/scheduler_config.json in its metadata)\n"
    )
    assert Image.open("x.png").tobytes() == Image.open("y.png").tobytes()
    folder, single = read_record(Path("x.png")), read_record(Path("y.png"))
    assert (folder["model"], single["model"]) == ("tiny", "tiny.safetensors")
    assert folder["sha256"] != single["sha256"]


def test_each_option_reaches_the_picture(run: Run) -> None:
    def picture(*options: str) -> bytes:
        assert run("a house", "-o", "x.png", "--steps", "2", *options)[0] == 0
        return Image.open("x.png").tobytes()

    first = picture()
    assert picture() == first
    for option in (
        "--negative=boat",
        "--guidance=2",
        "--rescale=0.9",
        "--eta=1",
        "--seed=1",
        "--sampler=ddpm",
        "--steps=3",
    ):
        assert picture(option) != first, option


BAD_INPUT: list[tuple[list[str], str]] = [
    ([""], "the prompt is empty"),
    (["a", "--sampler", "magic"], "sampler 'magic' is unknown; there are ddim, ddpm"),
    (["a", "--steps", "0"], "steps is 0"),
    (["a", "--steps", "few"], "valid integer"),
    (["a", "--width", "100"], "width is 100, which is not a multiple of 8"),
    (["a", "--height", "-8"], "height is -8"),
    (["a", "--guidance", "nan"], "guidance is nan"),
    (["a", "--seed", "-1"], "seed is -1"),
    (["a", "-n", "0"], "count is 0"),
    (["a", "-n", "1000000000"], "count is 1000000000; give at most 10000"),
    (["a", "--init", "x.png", "--strength", "inf"], "strength is inf; give a number from 0 to 1"),
    (["a", "--init", "x.png", "--strength", "nan"], "strength is nan; give a number from 0 to 1"),
    (["a", "--dtype", "int8"], "dtype 'int8' is unknown"),
    (["a", "--device", "gpu"], "device 'gpu' is unknown"),
    (["a", "--model", "none"], "model none does not exist"),
    (["a", "--model", "hub:name"], "hub:name names no model; write hub:OWNER/NAME"),
    (["a", "-o", "none/x.png"], "folder none does not exist; make it first"),
    (["a", "-o", "/proc/x.png"], "nothing can be written to /proc"),
    (["a", "-o", "x.jpg"], "ends in .png"),
    ([], "give one prompt in quotes, or a file of them with --prompts"),
    (["a", "--prompts", "x.txt"], "give one prompt in quotes, or a file of them with --prompts"),
    (["--prompts", "x.txt", "-o", "pictures"], "x.txt: No such file"),
    (["--prompts", "x.txt", "--strict-tokens"], "--strict-tokens goes with one prompt"),
    (["a", "--mask", "m.png"], "mask"),
    (["a", "--strength", "0.5"], "strength"),
    (["a", "--init", "none.png"], "none.png"),
    (["a", "--lora", "none.safetensors:0.5"], "none.safetensors"),
    (["a", "--lora", "x.safetensors:much"], "much"),
    (["a", "--syntax", "magic"], "'magic' is not one of"),
    (["a", "--clip-skip", "9"], "clip_skip"),
    (["a", "--guidance-interval", "3", "1"], "guidance interval is 3 to 1; give two numbers, 0 <= low < high"),
    (["a", "--guidance-interval", "0", "inf"], "guidance interval is 0 to inf"),
    (["a", "--spacing", "magic"], "spacing 'magic' is unknown; there are leading, trailing"),
    (["a", "--reuse", "0"], "reuse is 0; give a number of steps, at least 1"),
    (["a", "--merge-tokens", "0.9"], "merge tokens is 0.9; give a share from 0 to 0.75"),
    (["a", "b"], "unexpected extra argument"),
    (["a", "--magic"], "No such option"),
]


@pytest.mark.parametrize(("arguments", "fault"), BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, arguments: list[str], fault: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert fault.lower() in err.lower()
    assert os.listdir() == []


@pytest.mark.parametrize("option", ["--width", "--height", "--steps"])
def test_a_number_too_large_for_a_float_is_refused_beside_an_image(run: Run, tmp_path: Path, option: str) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "init.png")
    code, out, err = run("a", "--init", str(tmp_path / "init.png"), option, "1" + 400 * "0")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert " is 1000" in err
    assert err.count("\n") == 1


def test_a_file_of_prompts_is_rendered_once(run: Run) -> None:
    Path("list.jsonl").write_text('{"prompt": "a house", "seed": 7}\n{"prompt": "two fish", "steps": 2}\n')
    code, out, _ = run("--prompts", "list.jsonl", "-o", "pictures", "--json")
    paths = ["pictures/00000-a-house-7.png", "pictures/00001-two-fish-1.png"]
    assert (code, out.splitlines()[:2]) == (0, paths)
    assert [each["rendered"] for each in json.loads(out.splitlines()[2])["pictures"]] == [True, True]
    assert [read_record(Path(path))["steps"] for path in paths] == [1, 2]
    again = run("--prompts", "list.jsonl", "-o", "pictures", "--json")[1].splitlines()[2]
    assert [each["rendered"] for each in json.loads(again)["pictures"]] == [False, False]


def test_a_picture_is_replayed(run: Run, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("a house", "-o", "x.png", "--init", str(picture_file()), "--strength", "1")[0] == 0
    capsys.readouterr()
    arguments = ["replay", "x.png", "--init", "init.png", "--model", str(model_folder), "-o", "y.png", "--json"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "y.png"
    assert json.loads(out.splitlines()[1])["identical"]
    assert err.splitlines()[-1] == "notice: identical"
    assert Image.open("y.png").tobytes() == Image.open("x.png").tobytes()


def picture_file() -> Path:
    Image.new("RGB", (64, 64), "orange").save("init.png")
    return Path("init.png")


def test_no_accelerator(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    code, _, err = run("a", "--device", "cuda")
    assert (code, err) == (2, "error: device 'cuda' is not available here; use cpu\n")


def test_broken_models(run: Run, folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.write_bytes(b"")
    code, out, err = run("a", model=folder)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {weights} is no intact safetensors file")


def test_unwritable_output_is_known_before_the_model_is_read(run: Run, tmp_path: Path) -> None:
    code, _, err = run("a", "-o", "none/x.png", model=tmp_path / "none")
    assert code == 2
    assert "folder none does not exist" in err


def test_the_word_render_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["a house"]) == 2
    assert capsys.readouterr().err == "error: No such command 'a house'. (see ldm --help)\n"
    assert exit_code([]) == 2
    assert capsys.readouterr().err.startswith("error: Missing command")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"ldm {pipelines.__version__}\n"
    assert exit_code(["--help"]) == 0
    assert "render" in capsys.readouterr().out
    assert exit_code(["render", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(
        f"--{name}" in text for name in ("output", "model", "negative", "steps", "guidance", "rescale", "sampler")
    )
    assert all(f"--{name}" in text for name in ("eta", "seed", "count", "width", "height", "device", "dtype", "json"))


def test_an_interruption_is_no_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> Iterator[None]:
        raise KeyboardInterrupt

    monkeypatch.setattr(one_prompt, "output_paths", interrupt)
    code, out, err = run("a")
    assert (code, out, err.strip()) == (130, "", "")


def test_progress_is_shown_on_a_terminal_only(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = run("a", "--steps", "3")
    assert (code, out) == (0, "a-0.png\n")
    assert "render" in err
    assert "/3" in err


def in_new_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    root = Path(pipelines.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False, **options
    )


def test_a_new_process_imports_little_renders_and_refuses(model_folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pipelines.cli import main; code = main();"
        " print(sorted({'torch._dynamo', 'diffusers', 'transformers', 'accelerate', 'datasets'} & sys.modules.keys()));"
        " sys.exit(code)"
    )
    shared = ["-c", program, "render", "--model", str(model_folder), "--device", "cpu", "--steps", "1"]
    done = in_new_process(*shared, "a house", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a-house-0.png\n[]\n", "")
    done = in_new_process(*shared, "a house", "--width", "7", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: width is 7, which is not a multiple of 8; the nearest is 8\n"


def test_help_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys, pipelines, pipelines.cli; pipelines.cli.main(['render', '--help']);"
        " print(sorted({'torch', 'numpy', 'PIL', 'tokenizers', 'tqdm', 'rich'} & sys.modules.keys()))"
    )
    done = in_new_process("-c", program, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_package_exports_the_pipeline_only() -> None:
    assert pipelines.TextToImagePipeline.__name__ == "TextToImagePipeline"
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = pipelines.Nothing


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (ValueError("two\n  lines"), "error: two lines\n"),
        (ValueError(), "error: ValueError\n"),
        (PermissionError(13, "Permission denied", "x.png"), "error: x.png: Permission denied\n"),
        (SafetensorError("no space left"), "error: no space left\n"),
        (MemoryError(), "error: out of memory; make fewer or smaller pictures at once\n"),
        (torch.OutOfMemoryError("CUDA"), "error: out of memory; make fewer or smaller pictures at once\n"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "error: out of memory; make fewer or smaller pictures at once\n",
        ),
    ],
)
def test_faults_that_the_user_can_mend(fault: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving, errors.one_line_errors():
        raise fault
    assert leaving.value.code == 2
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("fault", [RuntimeError("shapes"), KeyError("x"), AssertionError()])
def test_defects_keep_their_traceback(fault: Exception) -> None:
    with pytest.raises(type(fault)), errors.one_line_errors():
        raise fault


def test_an_interrupted_script_leaves_with_130() -> None:
    with pytest.raises(SystemExit) as leaving, errors.one_line_errors():
        raise KeyboardInterrupt
    assert leaving.value.code == 130
