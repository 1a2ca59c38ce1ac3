"""A file of prompts becomes a folder of pictures, whatever happens on the way."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import TextToImagePipeline, prompt_file
from pipelines.image_to_image import InitImage, open_init
from pipelines.png import read_record
from pipelines.prompt_file import Done, device_of, open_folder, process_of, read_prompts, render_prompts
from pipelines.replay import Record, replay
from pipelines.request import Request

TEXT = "# five\na red house\n\ntwo fish!\n a boat \na car\na moon\n"
NAMES = ["00000-a-red-house-5", "00001-two-fish-6", "00002-a-boat-7", "00003-a-car-8", "00004-a-moon-9"]
FAST = {"steps": 2}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_file, "BATCH", 2)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The prompts of each request that the pipeline renders."""
    calls: list[list[str]] = []
    render = TextToImagePipeline.render

    def counted(self: TextToImagePipeline, request: Request, *others: Any, **options: Any) -> Any:
        calls.append(list(request.prompts))
        return render(self, request, *others, **options)

    monkeypatch.setattr(TextToImagePipeline, "render", counted)
    return calls


def written(text: str, name: str = "prompts.txt") -> Path:
    Path(name).write_text(text, encoding="utf-8")
    return Path(name)


def objects(*lines: dict[str, Any]) -> Path:
    return written("".join(json.dumps(line) + "\n" for line in lines), "prompts.jsonl")


def rendered(
    pipe: TextToImagePipeline, file: Path, folder: str, process: tuple[int, int] = (0, 1), **options: Any
) -> list[Done]:
    prompts = read_prompts(file, 5, {**FAST, **options})
    return list(render_prompts(pipe, prompts, open_folder(Path(folder)), process))


def contents(folder: str) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def largest_difference(one: str, two: str) -> int:
    pairs = [
        [np.asarray(Image.open(path)).astype(int) for path in sorted(Path(folder).iterdir())] for folder in (one, two)
    ]
    return max(int(np.abs(a - b).max()) for a, b in zip(*pairs, strict=True))


@contextmanager
def memory_for(pipe: TextToImagePipeline, rows: int, fault: Exception) -> Iterator[None]:
    def refuse(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > rows:
            raise fault

    hook = pipe.unet.conv_out.register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


def test_each_line_is_a_picture_with_its_number_and_seed(pipe: TextToImagePipeline, batches: list[list[str]]) -> None:
    done = rendered(pipe, written(TEXT), "out")
    assert [(one.path.stem, one.seed, one.rendered) for one in done] == [
        (name, 5 + index, True) for index, name in enumerate(NAMES)
    ]
    assert list(contents("out")) == NAMES
    assert batches == [["a red house", "two fish!"], ["a boat", "a car"], ["a moon"]]
    record = Record.read(Path("out/00003-a-car-8.png"))
    assert (record.prompt, record.seed, record.steps, record.batch) == ("a car", 8, 2, 2)
    alone = pipe("a car", seed=8, num_inference_steps=2).images
    assert isinstance(alone, list)
    assert np.abs(np.asarray(alone[0]).astype(int) - np.asarray(Image.open(done[3].path))).max() <= 1


def test_a_line_may_differ_in_all_that_the_command_can_say(pipe: TextToImagePipeline, here: Path) -> None:
    Image.new("RGB", (48, 40), "red").save("init.png")
    Image.new("L", (48, 40), 255).save("mask.png")
    lines: list[dict[str, Any]] = [
        {"prompt": "a house"},
        {"prompt": "a house", "seed": 3, "count": 2, "negative": "blue", "guidance": 2, "width": 72, "height": 56},
        {"prompt": "(a) house", "steps": 3, "sampler": "ddpm", "rescale": 0.5, "syntax": "weighted", "clip_skip": 1},
        {"prompt": "a house", "eta": 0.5, "sampler": "ddim", "guidance_interval": [1, 2.5], "reuse": 2, "seed": None},
        {"prompt": "a fish", "spacing": "karras"},
        {"prompt": "a house", "init": "init.png", "mask": "mask.png", "strength": 0.5},
        {"prompt": "a house", "init": "init.png"},
    ]
    done = rendered(pipe, objects(*lines), "out", negative="ship")
    assert sorted(one.path.stem for one in done) == [
        "00000-a-house-5",
        "00001-a-house-3",
        "00001-a-house-4",
        "00002-a-house-7",
        "00003-a-house-8",
        "00004-a-fish-9",
        "00005-a-house-10",
        "00006-a-house-11",
    ]
    records = [Record.read(path) for path in sorted(Path("out").iterdir())]
    assert [record.negative for record in records] == ["ship", "blue", "blue", "ship", "ship", "ship", "ship", "ship"]
    default = {"steps": 2, "guidance": 7.5, "rescale": 0.0, "sampler": "ddim", "eta": 0.0, "width": 64, "height": 64}
    default |= {"syntax": "plain", "clip_skip": 0, "strength": None, "guidance_interval": None, "reuse": 1}
    default |= {"spacing": "leading"}
    for record, line in zip(records, [lines[0], lines[1], *lines[1:]], strict=True):
        given = {name: line[name] for name in default.keys() & line.keys()}
        if "guidance_interval" in given:
            given["guidance_interval"] = (1, 2.5)
        if "init" in line:
            given |= {"width": 48, "height": 40, "strength": line.get("strength", 0.8)}
        assert {name: getattr(record, name) for name in default} == {**default, **given}
    assert [record.init and record.init.file for record in records[-3:]] == [None, "init.png", "init.png"]
    assert [record.mask and record.mask.file for record in records[-3:]] == [None, "mask.png", None]
    assert len({path.read_bytes() for path in Path("out").iterdir()}) == 8


def test_what_is_there_is_skipped(pipe: TextToImagePipeline, batches: list[list[str]]) -> None:
    rendered(pipe, written(TEXT), "out")
    before = contents("out")
    batches.clear()
    done = rendered(pipe, written(TEXT), "out")
    assert [(one.path.stem, one.rendered) for one in done] == [(name, False) for name in NAMES]
    assert batches == []
    assert contents("out") == before


def test_only_the_batches_of_new_lines_are_rendered(pipe: TextToImagePipeline, batches: list[list[str]]) -> None:
    rendered(pipe, written(TEXT), "out")
    before = contents("out")
    batches.clear()
    done = rendered(pipe, written(TEXT + "a star\n"), "out")
    assert [one.path.stem for one in done if one.rendered] == ["00005-a-star-10"]
    assert batches == [["a moon", "a star"]]
    assert {**contents("out"), **before} == contents("out")


@pytest.mark.parametrize(
    ("change", "told"),
    [({"steps": 3}, "steps was 2, now 3"), ({"guidance": 2.0}, "guidance was 7.5, now 2.0")],
)
def test_what_was_made_otherwise_is_rendered_anew(
    pipe: TextToImagePipeline, capsys: pytest.CaptureFixture[str], change: dict[str, Any], told: str
) -> None:
    rendered(pipe, written("a house\n"), "out")
    before = contents("out")
    assert capsys.readouterr().err == ""
    (done,) = rendered(pipe, written("a house\n"), "out", **change)
    assert done.rendered
    notice = f"notice: out/00000-a-house-5.png was made otherwise and is rendered anew: {told}\n"
    assert capsys.readouterr().err == notice
    assert contents("out") != before


def test_other_weights_render_anew_and_another_machine_does_not(pipe: TextToImagePipeline, here: Path) -> None:
    rendered(pipe, written("a house\n"), "out")
    path = next(Path("out").iterdir())
    record = Record.read(path)
    with Image.open(path) as picture:
        picture.load()
    for change, anew in (
        ({"sha256": "0"}, True),
        ({"prompt": "a house?"}, True),
        ({"dtype": "bfloat16"}, True),
        ({"ema": True}, True),
        ({"configs_sha256": "0"}, True),
        ({"spacing": "trailing"}, True),
        ({"device": "cuda", "versions": {}, "model": "other", "batch": 7}, False),
    ):
        prompt_file.write_png(path, picture, record.model_copy(update=change).model_dump())
        (done,) = rendered(pipe, written("a house\n"), "out")
        assert done.rendered is anew, change


def test_a_picture_of_an_earlier_version_is_skipped_unless_something_else_is_asked_for(
    pipe: TextToImagePipeline, here: Path
) -> None:
    (done,) = rendered(pipe, written("a house\n"), "out")
    record = read_record(done.path)
    for name in ("spacing", "prediction", "ema", "configs_sha256"):
        del record[name]
    with Image.open(done.path) as picture:
        prompt_file.write_png(done.path, picture, record)
    assert [one.rendered for one in rendered(pipe, written("a house\n"), "out")] == [False]
    assert [one.rendered for one in rendered(pipe, written("a house\n"), "out", spacing="leading")] == [False]
    assert [one.rendered for one in rendered(pipe, written("a house\n"), "out", spacing="karras")] == [True]


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_a_broken_picture_is_rendered_anew(
    pipe: TextToImagePipeline, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    rendered(pipe, written(TEXT), "out")
    before = contents("out")
    path = Path("out") / f"{NAMES[2]}.png"
    path.write_bytes(before[NAMES[2]][:-500] if content is None else content)
    done = rendered(pipe, written(TEXT), "out")
    assert [one.path.stem for one in done if one.rendered] == [NAMES[2]]
    assert contents("out") == before
    assert capsys.readouterr().err.endswith("; it is rendered anew\n")


@pytest.mark.parametrize("pictures", range(6))
def test_an_interrupted_run_writes_the_same_bytes_in_the_end(
    pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch, pictures: int
) -> None:
    write = prompt_file.write_png

    def interrupted(path: Path, *arguments: Any) -> None:
        if len(list(path.parent.iterdir())) == pictures:
            raise KeyboardInterrupt
        write(path, *arguments)

    rendered(pipe, written(TEXT), "whole")
    with monkeypatch.context() as patch:
        patch.setattr(prompt_file, "write_png", interrupted)
        if pictures < 5:
            with pytest.raises(KeyboardInterrupt):
                rendered(pipe, written(TEXT), "out")
    assert len(rendered(pipe, written(TEXT), "out")) == 5
    assert contents("out") == contents("whole")


def test_two_processes_write_what_one_does(pipe: TextToImagePipeline, batches: list[list[str]]) -> None:
    rendered(pipe, written(TEXT), "one")
    batches.clear()
    shares = [rendered(pipe, written(TEXT), "two", (index, 2)) for index in range(2)]
    assert [[one.path.stem for one in share] for share in shares] == [[*NAMES[:2], NAMES[4]], NAMES[2:4]]
    assert len(batches) == 3
    assert contents("one") == contents("two")


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_too_little_memory_halves_the_batches(
    pipe: TextToImagePipeline,
    batches: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: Exception,
) -> None:
    monkeypatch.setattr(prompt_file, "BATCH", 4)
    rendered(pipe, written(TEXT), "plenty")
    batches.clear()
    with memory_for(pipe, rows=2, fault=fault):  # guidance takes two for each picture
        done = rendered(pipe, written(TEXT), "little")
    assert [one.path.stem for one in done] == NAMES
    assert [len(batch) for batch in batches] == [4, 2, 1, 1, 1, 1, 1]
    assert largest_difference("plenty", "little") <= 1
    assert capsys.readouterr().err == (
        "notice: memory is too small for 4 pictures at once; going on with 2\n"
        "notice: memory is too small for 2 pictures at once; going on with 1\n"
    )


def test_too_little_memory_for_one_picture_and_other_faults_are_errors(
    pipe: TextToImagePipeline, batches: list[list[str]]
) -> None:
    for fault, calls in ((torch.OutOfMemoryError("CUDA"), 2), (RuntimeError("shapes"), 1)):
        batches.clear()
        with memory_for(pipe, rows=0, fault=fault), pytest.raises(RuntimeError, match=str(fault)):
            rendered(pipe, written(TEXT), "out")
        assert len(batches) == calls
    assert contents("out") == {}


def test_prompts_of_another_length_are_batches_of_their_own(
    pipe: TextToImagePipeline, batches: list[list[str]]
) -> None:
    long = "a house BREAK a fish"
    rendered(pipe, written(f"a\n{long}\nb\n{long}s\n"), "out", syntax="weighted")
    assert batches == [["a", "b"], [long, f"{long}s"]]


def test_a_picture_of_a_batch_is_replayed_to_the_bit(pipe: TextToImagePipeline, model_folder: Path) -> None:
    rendered(pipe, written(TEXT), "out")
    assert replay(f"out/{NAMES[3]}.png", model_folder).identical


BAD_LINES: list[tuple[str, str]] = [
    ('{"prompt": ', 'no valid JSON, Expecting value at column 11; write {"prompt": "a red house", "seed": 7}'),
    ("[" * 100_000, "no valid JSON"),
    ("[]", "no object with a prompt; write"),
    ('{"seed": 3}', "no object with a prompt; write"),
    ('{"prompt": "a", "step": 3}', "key 'step' is unknown; there are prompt, negative, seed"),
    ('{"prompt": null}', "no object with a prompt; write"),
    ('{"prompt": 3}', "prompt is 3: input should be a valid string"),
    ('{"prompt": "a", "steps": "few"}', "steps is 'few': input should be a valid integer"),
    ('{"prompt": "a", "steps": true}', "steps is True: input should be a valid integer"),
    ('{"prompt": "a", "seed": -1}', "seed is -1: input should be greater than or equal to 0"),
    ('{"prompt": "a", "count": 0}', "count is 0: input should be greater than or equal to 1"),
    ('{"prompt": "a", "syntax": "loud"}', "syntax is 'loud', but only 'plain' or 'weighted' is supported"),
    ('{"prompt": " "}', "the prompt is empty"),
    ('{"prompt": "a", "steps": 0}', "steps is 0; give a number from 1 to 1000"),
    ('{"prompt": "a", "width": 63}', "width is 63, which is not a multiple of 8"),
    ('{"prompt": "a", "guidance": NaN}', "guidance is nan"),
    ('{"prompt": "a", "sampler": "magic"}', "sampler 'magic' is unknown"),
    ('{"prompt": "[a|b]", "syntax": "weighted"}', "prompt editing"),
    ('{"prompt": "a", "init": "none.png"}', "image none.png is no readable picture"),
    ('{"prompt": "a", "strength": 0.5}', "there is no image to start from"),
    ('{"prompt": "a", "init": "init.png", "strength": 0.1}', "strength 0.1 of 2 steps leaves none to make"),
    ('{"prompt": "a", "clip_skip": 2}', "clip_skip is 2; this text encoder has 2 layers: give 0 to 1"),
]


@pytest.mark.parametrize(("line", "fault"), BAD_LINES)
def test_a_fault_is_told_with_its_line_before_anything_is_rendered(
    pipe: TextToImagePipeline, batches: list[list[str]], line: str, fault: str
) -> None:
    Image.new("RGB", (64, 64)).save("init.png")
    file = written(f'{{"prompt": "a house"}}\n\n{line}\n', "prompts.jsonl")
    with pytest.raises(ValueError, match=f"^{file}:3: ") as caught:
        rendered(pipe, file, "out")
    assert fault in str(caught.value)
    assert batches == []


@pytest.mark.parametrize("option", [{"reuse": 2}, {"merge_tokens": 0.5}, {"tiled": True}])
def test_what_does_not_go_with_compile_is_told_before_anything_is_rendered(
    pipe: TextToImagePipeline, batches: list[list[str]], monkeypatch: pytest.MonkeyPatch, option: dict[str, Any]
) -> None:
    monkeypatch.setattr(pipe, "compiled", True)
    with pytest.raises(ValueError, match=r"^prompts\.jsonl:2: reuse, merge tokens and tiled do not go with compile"):
        rendered(pipe, objects({"prompt": "a house"}, {"prompt": "a fish", **option}), "out")
    assert batches == []


def test_a_missing_mask_of_an_inpainting_model_is_told_before_anything_is_rendered(
    pipe: TextToImagePipeline, batches: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextToImagePipeline, "inpaints", True)
    Image.new("RGB", (64, 64), "white").save("init.png")
    both = {"prompt": "a house", "init": "init.png", "mask": "init.png"}
    with pytest.raises(ValueError, match=r"^prompts\.jsonl:2: this is an inpainting model; give an image and a mask"):
        rendered(pipe, objects(both, {"prompt": "a fish", "init": "init.png"}), "out")
    assert batches == []


def test_pictures_to_start_from_are_not_in_memory_all_at_once(
    pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[ref[InitImage]] = []
    alive = []

    def opened(*arguments: Any) -> InitImage | None:
        init = open_init(*arguments)
        assert init is not None
        found.append(ref(init))
        alive.append(sum(each() is not None for each in found))
        return init

    monkeypatch.setattr(prompt_file, "open_init", opened)
    names = [f"{index}.png" for index in range(5)]
    for name in names:
        Image.new("RGB", (64, 64)).save(name)
    prompts = read_prompts(objects(*({"prompt": "a", "init": name} for name in names for _ in "ab")), 0, FAST)
    assert [len(batch) for batch in prompt_file.plan(pipe, prompts)] == [2] * 5
    assert alive == [1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("x.csv", b"a", "x.csv is no list of prompts; give FILE.txt"),
        ("x.txt", b"\xff\xfe", "x.txt is no text in UTF-8"),
        ("x.txt", b"\n# nothing\n", "x.txt holds no prompt; write one on each line"),
        ("x.jsonl", b"", "x.jsonl holds no prompt"),
    ],
)
def test_bad_files(name: str, content: bytes, fault: str) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=fault):
        read_prompts(Path(name), 0, {})


def test_a_missing_file() -> None:
    with pytest.raises(FileNotFoundError):
        read_prompts(Path("none.txt"), 0, {})


def test_any_editor_may_have_written_the_file() -> None:
    Path("x.txt").write_bytes("\ufeffein Haus\r\nline\u2028separator\r\n".encode())
    assert [prompt.options.prompt for prompt in read_prompts(Path("x.txt"), 0, {})] == [
        "ein Haus",
        "line\u2028separator",
    ]


def test_the_folder() -> None:
    assert open_folder(Path("a/b")).is_dir()
    assert list(Path("a/b").iterdir()) == []
    with pytest.raises(ValueError, match="need a folder; give it with -o FOLDER"):
        open_folder(None)
    with pytest.raises(ValueError, match=r"x\.txt is a file; give the name of a folder"):
        open_folder(written("a", "x.txt"))
    with pytest.raises(ValueError, match="nothing can be written to /proc"):
        open_folder(Path("/proc"))


def test_the_processes_of_a_launch() -> None:
    assert process_of({}) == (0, 1)
    assert process_of({"RANK": "2", "WORLD_SIZE": "3"}) == (2, 3)
    for environment in ({"RANK": "3", "WORLD_SIZE": "3"}, {"RANK": "one"}, {"WORLD_SIZE": "-1"}, {"RANK": "1"}):
        with pytest.raises(ValueError, match=r"RANK is .* and WORLD_SIZE .*; unset both"):
            process_of(environment)


def test_the_device_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda: Callable[..., torch.device] = lambda check_available: torch.device("cuda")  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "current_accelerator", cuda)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert device_of({"LOCAL_RANK": "1"}, None) == torch.device("cuda:1")
    assert device_of({"LOCAL_RANK": "2"}, "cuda") == torch.device("cuda:0")
    assert device_of({"LOCAL_RANK": "1"}, "cuda:0") == torch.device("cuda:0")
    assert device_of({"LOCAL_RANK": "1"}, "cpu") == torch.device("cpu")
    assert device_of({}, None) == torch.device("cuda")
    with pytest.raises(ValueError, match="LOCAL_RANK is 'one'"):
        device_of({"LOCAL_RANK": "one"}, None)
