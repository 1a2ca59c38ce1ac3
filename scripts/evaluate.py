"""Measure a model: caption accuracy, FID, KID, precision, recall, what the autoencoder loses; all with intervals.

    python scripts/evaluate.py [MODEL] [--prompts 500] [--guidance 3 1] [--report FILE.html] [--json FILE] [--record]
    accelerate launch scripts/evaluate.py MODEL --data FOLDER [--features inception:FILE | clip:FOLDER]

Without `--data` the prompts are the captions of held-out picturebook scenes, and a judge reads back whether each
picture shows what its caption states. With it they are the captions of a folder as training takes it, and the real
pictures are all of that folder. Prompts are taken in order; picture i has seed i; nothing is chosen or tried twice.
Several processes share the work and get, picture for picture, what one gets.
"""

import argparse
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluation import metrics
from evaluation.caption_accuracy import Readings, accuracy, controls, read_all
from evaluation.card import update_card
from evaluation.exhibits import galleries
from evaluation.feature_networks import HOW, FeatureNetwork, open_network
from evaluation.likelihood import bound_in_words
from evaluation.measurements import Measurements, from_pixels, measure
from evaluation.metrics import Measured
from evaluation.real_pictures import RealPictures, from_folder, from_picturebook
from evaluation.report import write_report
from output_files import check_file, check_picture
from picturebook import WORLD
from sheet import to_images, write_sheet

from pipelines import TextToImagePipeline
from pipelines.errors import notice, one_line_errors
from pipelines.json_files import write_json
from pipelines.prompt_file import device_of

SEED = 2_000_001  # of the scenes that models are scored on; settings are chosen on other seeds
JUDGE = "judge"
"""The feature network that is always at hand. Of pictures from elsewhere it sees colours and shapes, and no more."""
FEWEST = 8  # pictures: each half of the real ones needs more than `metrics.NEIGHBOURS`


def figures(
    pipe: TextToImagePipeline, real: RealPictures, network: FeatureNetwork, found: Measurements
) -> dict[str, Any]:
    """All figures, as `ldm.json` records them and the report shows them."""
    prompts, decoded = len(real.prompts), found.decoded
    features = found.real["features"]
    sets = {
        "real against real": (features[::2], features[1::2], False),
        "real against reconstructions": (features[:prompts], decoded["features"], True),
    }
    shown = {"real pictures": found.real, "reconstructions": decoded}
    for name, rows in found.generated.items():
        sets[f"real against generated, {name}"] = (features, rows["features"], False)
        shown[f"generated, {name}"] = rows
    manifolds = {name: metrics.precision_and_recall(*two) for name, (*two, _) in sets.items()}
    pixels = {"all pixels": decoded["psnr"]} | ({"boxes": decoded["psnr in boxes"]} if real.scenes else {})
    result: dict[str, Any] = {
        "pictures": prompts,
        "real pictures": real.count,
        "size": real.size,
        "data fingerprint": real.fingerprint,
        "features": network.describe() | {"dimensions": features.shape[1]},
        "reconstruction psnr": _as_json({name: metrics.mean(values) for name, values in pixels.items()}),
        "reconstruction ssim": _as_json({"all pixels": metrics.mean(decoded["ssim"])}),
        "fid": {"feature network": network.weights[0].name}
        | _as_json({name: metrics.measured_frechet(*two) for name, two in sets.items()}),
        "kid": _as_json({name: metrics.kernel_distance(*two) for name, two in sets.items()}),
        **{side: _as_json({name: two[side] for name, two in manifolds.items()}) for side in ("precision", "recall")},
    }
    if real.scenes is not None:
        share = metrics.explained(features, [scene.background for scene in real.scenes])
        result["features"]["variance explained by the background"] = round(share, 3)
    if network.classes is not None:
        scores = {name: metrics.measured_inception_score(rows["logits"]) for name, rows in shown.items()}
        result["inception-style score"] = _as_json(scores)
    if network.embed_texts is not None:
        with torch.inference_mode():
            texts = network.embed_texts(real.prompts)
        matches = {name: metrics.clip_scores(rows["features"][:prompts], texts) for name, rows in shown.items()}
        matches["real pictures, another's caption"] = metrics.clip_scores(features[:prompts], texts.roll(1, 0))
        result["clip score"] = _as_json({name: metrics.mean(values) for name, values in matches.items()})
    if found.bits is not None:
        counted = {"pictures": len(found.bits["bits"]), **bound_in_words(pipe)}
        result["bits per dimension"] = counted | _as_json({"mean": metrics.mean(found.bits["bits"])})
    result["pictures compared"] = {name: [len(one), len(other)] for name, (one, other, _) in sets.items()}
    result["resamples"] = {
        "means": metrics.RESAMPLES,
        "fid": metrics.set_resamples(features.shape[1]),
        "kid": metrics.SET_RESAMPLES,
    }
    return result


def _as_json(named: Mapping[str, Measured]) -> dict[str, Any]:
    """Each figure under its name, to five digits, and all their intervals under "intervals"."""

    def short(value: float) -> float:
        return float(f"{value:.5g}")

    values = {name: short(each.value) for name, each in named.items()}
    return values | {"intervals": {name: [short(each.low), short(each.high)] for name, each in named.items()}}


def judgements(real: RealPictures, found: Measurements) -> tuple[dict[str, Any], dict[str, Readings]]:
    """Caption accuracy and the judge's controls, and what it read; nothing where the scenes are not known."""
    if real.scenes is None:
        return {}, {}
    count = len(real.scenes)
    pixels = {name: from_pixels(rows["pixels"]) for name, rows in found.generated.items()}
    pictures = {"real": real.images(0, count), "decoded": from_pixels(found.decoded["pixels"])} | pixels
    readings = {name: read_all(real.scenes, images) for name, images in pictures.items()}
    result = {
        "two things and a relation": round(float(np.mean([s.relation is not None for s in real.scenes])), 3),
        "controls": controls(real.scenes, readings["real"], readings["decoded"]),
    }
    return result | {name: accuracy(readings[name].scores) for name in found.generated}, readings


def write_sheets(file: Path, real: RealPictures, found: Measurements) -> None:
    """A PNG with the first 24 generated pictures, and beside it one with 12 real ones and their reconstructions."""
    generated, decoded = next(iter(found.generated.values()))["pixels"], from_pixels(found.decoded["pixels"][:12])
    write_sheet(file, to_images(from_pixels(generated[:24])), columns=8)
    shown = torch.stack([real.images(0, len(decoded)), decoded], 1).flatten(0, 1)
    write_sheet(file.with_stem(file.stem + "-reconstructions"), to_images(shown), columns=8)


def record(pipe: TextToImagePipeline, result: dict[str, Any]) -> None:
    """Write a result into the `scores` of the model's `ldm.json`, and into its card if that has a place for it."""
    folder = pipe.model.folder
    assert folder is not None
    settings = pipe.settings.model_copy(update={"scores": result})
    write_json(folder / "ldm.json", settings.model_dump(mode="json", exclude_none=True))
    update_card(folder / "README.md", result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", help="model folder; by default the built-in model")
    parser.add_argument("--data", type=Path, help="folder of images with metadata.jsonl, instead of the picturebook")
    parser.add_argument("--features", help=f"feature network: judge (the default), judge-things, {HOW}")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--seed", type=int, help="of the picturebook; choose settings on another one than the default")
    parser.add_argument("--steps", type=int, help="by default the model's own")
    parser.add_argument("--guidance", type=float, nargs="+", help="one or more scales; by default the model's own")
    parser.add_argument("--sampler", help="by default the model's own")
    parser.add_argument("--bits", type=int, default=0, help="also the likelihood of so many real pictures; slow")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--cache", type=Path, help="folder that keeps the real pictures' features for the next time")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--record", action="store_true", help="also write the result into ldm.json and card of MODEL")
    parser.add_argument("--report", type=Path, help="HTML file with tables, plots and pictures")
    parser.add_argument("--sheet", type=Path, help="PNG with the first 24 pictures")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be had, before anything is computed."""
    if args.prompts < FEWEST:
        raise ValueError(f"--prompts is {args.prompts}; give at least {FEWEST}")
    if not 0 <= args.bits <= args.prompts:
        raise ValueError(f"--bits is {args.bits}; give a number from 0 to the {args.prompts} of --prompts")
    check_file("--report", args.report)
    check_file("--json", args.json)
    check_picture("--sheet", args.sheet)
    if args.data is not None and args.seed is not None:
        raise ValueError("--seed draws picturebook scenes; with --data the prompts are the folder's first captions")


def evaluate(args: argparse.Namespace) -> None:
    """All that `main` does with its arguments. Raises ValueError and OSError for what the user can mend."""
    from accelerate import PartialState

    check(args)
    pipe = TextToImagePipeline.from_pretrained(args.model, device_of(os.environ, args.device), args.dtype)
    if args.record and pipe.model.folder is None:
        raise ValueError(f"--record writes into a model folder, but {args.model} is a file; write --json instead")
    guidances = args.guidance or [None]
    asked = {"steps": args.steps, "sampler": args.sampler, "rescale": 0.0, "eta": 0.0}
    request, *_ = [pipe.request(("",), ("",), guidance=guidance, **asked) for guidance in guidances]
    if request.width != request.height:
        raise ValueError(f"this model makes {request.width}x{request.height}; only square pictures are evaluated")
    network = open_network(args.features or JUDGE, pipe.device)
    if args.data is not None and network.name.startswith(JUDGE):
        network = replace(network, classes=None)  # those of another world
        notice(f"the judge's features serve to compare models of this folder alone; other --features are {HOW}")
    seed = SEED if args.seed is None else args.seed
    if args.data is None:
        real = from_picturebook(args.prompts, seed, request.width)
    else:
        real = from_folder(args.data, args.prompts, request.width)
    state = PartialState(cpu=pipe.device.type == "cpu")  # from here on all processes work together
    found = measure(
        pipe,
        real,
        network,
        guidances=guidances,
        steps=args.steps,
        sampler=args.sampler,
        bits=args.bits,
        cache=args.cache,
    )
    if not state.is_main_process:
        return
    judged, readings = judgements(real, found)
    result = {"world": WORLD, "seed": seed} if args.data is None else {}
    result |= figures(pipe, real, network, found) | judged
    result |= {"steps": request.steps, "sampler": request.sampler}
    result["versions"] = {
        "torch": torch.__version__,
        "torchmetrics": version("torchmetrics"),
        "python": platform.python_version(),
        "dtype": str(pipe.dtype),
        "device": pipe.device.type,
        **network.version(),
    }
    print(json.dumps(result, indent=2), flush=True)  # first of all, so that no full disk loses it
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.record:
        record(pipe, result)
    if args.sheet is not None:
        write_sheets(args.sheet, real, found)
    if args.report is not None:
        title = f"Evaluation of {Path(args.model).name if args.model else 'the built-in model'}"
        write_report(args.report, title, result, galleries(real, network, found, readings))


def main() -> None:
    args = parse()
    with one_line_errors():
        evaluate(args)


if __name__ == "__main__":
    main()
