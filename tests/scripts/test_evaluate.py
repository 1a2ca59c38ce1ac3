"""The figures of the evaluation against hand-made cases and closed forms."""

from pathlib import Path

import evaluate
import numpy as np
import picturebook
import pytest
import torch
from judge import load_judge
from PIL import Image

from pipelines import TextToImagePipeline
from pipelines.loading import load_model, save_model


def test_accuracy_counts_a_picture_only_if_all_is_right() -> None:
    scores = [
        {"kind 1": True, "color 1": True},
        {"kind 1": True, "color 1": False},
        {"kind 1": True, "color 1": True, "kind 2": False},
        {"kind 1": True, "color 1": True, "kind 2": True},
    ]
    result = evaluate.accuracy(scores)
    assert result["accuracy"] == 0.5
    assert result["per attribute"] == {"color": 0.75, "kind": round(5 / 6, 4)}
    assert result["per number of attributes"] == {2: [0.5, 2], 3: [0.5, 2]}
    low, high = result["interval"]
    assert 0 <= low < 0.5 < high <= 1


def test_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = evaluate.interval(list(values))
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.03)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert evaluate.interval([1.0] * 10) == [1.0, 1.0]


def test_psnr_over_all_pixels_and_over_boxes() -> None:
    scene, image = picturebook.picture(0, 3, size=64)
    real = evaluate.to_tensor([image])
    inside = torch.zeros(64, 64, dtype=torch.bool)
    for group in scene.things:
        for x0, y0, x1, y1 in group.boxes:
            inside[round(y0) : round(y1), round(x0) : round(x1)] = True
    error = 0.2
    decoded = real + error * inside
    psnr = evaluate.reconstruction_psnr([scene], real, decoded)
    assert psnr["boxes"] == pytest.approx(20 * np.log10(2 / error), abs=0.01)
    assert psnr["all pixels"] == pytest.approx(
        20 * np.log10(2 / error) - 10 * np.log10(inside.float().mean().item()), abs=0.01
    )


def test_tensor_of_pictures() -> None:
    tensor = evaluate.to_tensor([Image.new("RGB", (4, 2), (255, 0, 0))])
    assert tensor.shape == (1, 3, 2, 4)
    assert tensor[0, :, 0, 0].tolist() == [1, -1, -1]


def test_frechet_distance_is_zero_for_the_same_set_and_grows_with_the_difference() -> None:
    judge = load_judge()
    real = evaluate.to_tensor([image for _, image in (picturebook.picture(i, 4, "heldout") for i in range(60))])
    assert evaluate.frechet(judge, real, real) == pytest.approx(0, abs=1e-3)
    little, much = (evaluate.frechet(judge, real, real + error * torch.randn_like(real)) for error in (0.1, 0.5))
    assert 0 < little < much


def test_scores_are_recorded_in_folders_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.safetensors"
    save_model(file, load_model())
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(file), "--record"])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    assert stopped.value.code == 2
    assert "--record writes into a model folder" in capsys.readouterr().err


def test_the_default_model_draws_what_it_is_told(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    result = evaluate.evaluate(TextToImagePipeline.from_pretrained(), 24, seed=7, sheet=sheet)
    assert result["controls"]["real pictures"] == 1
    assert result["controls"]["reconstructions"] >= 0.9
    assert result["controls"]["another picture's caption"] == 0
    assert result["controls"]["noise"] == 0
    # Chance is 1 in 8. The model card has the measured scores.
    assert result["guidance 3"]["per attribute"]["background"] >= 0.5
    assert sheet.exists()
