"""The pictures behind the figures of an evaluation: first ones, right and failed ones, best and worst."""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from sheet import to_images
from torch import Tensor

from evaluation.caption_accuracy import Readings, in_words
from evaluation.feature_networks import FeatureNetwork
from evaluation.measurements import Measurements, from_pixels, to_pixels
from evaluation.metrics import clip_scores, nearest
from evaluation.real_pictures import RealPictures
from evaluation.report import Card, Gallery

FIRST, MANY, PAIRS = 24, 12, 9


def galleries(
    real: RealPictures, network: FeatureNetwork, found: Measurements, readings: Mapping[str, Readings]
) -> list[Gallery]:
    """All of them, for the first guidance; `readings` of the judge are there in the picturebook alone."""
    name, rows = next(iter(found.generated.items()))
    prompts, pixels = real.prompts, rows["pixels"]
    shown = [unselected(prompts, pixels)]
    if readings:
        originals = to_pixels(real.images(0, len(prompts)))
        shown += read_by_the_judge(prompts, pixels, readings[name])
        shown.append(misread("Real pictures", "The judge's own faults.", prompts, originals, readings["real"]))
        lost = "What the autoencoder lost, or the judge's own faults."
        shown.append(misread("Reconstructions", lost, prompts, found.decoded["pixels"], readings["decoded"]))
    if network.embed_texts is not None:
        with torch.inference_mode():
            shown += by_clip(prompts, pixels, rows["features"], network.embed_texts(prompts))
    shown += neighbours(real, pixels, rows["features"], found.real["features"])
    return shown + reconstructions(real, found.decoded["pixels"], found.decoded["psnr"])


def _pictures(pixels: Tensor, rows: Sequence[int]) -> list[Image.Image]:
    return to_images(from_pixels(pixels[list(rows)]))


def unselected(prompts: Sequence[str], pixels: Tensor) -> Gallery:
    rows = range(min(FIRST, len(prompts)))
    cards = [Card((("", image),), prompts[i]) for i, image in zip(rows, _pictures(pixels, rows), strict=True)]
    about = f"The first {len(rows)} prompts, one picture each, nothing chosen."
    return Gallery("Generated pictures", about, tuple(cards))


def read_by_the_judge(prompts: Sequence[str], pixels: Tensor, readings: Readings) -> list[Gallery]:
    """Generated pictures that the judge calls right, and failed ones with what it read."""
    faults = [[name for name, right in each.items() if not right] for each in readings.scores]
    right = [i for i, wrong in enumerate(faults) if not wrong]
    failed = sorted((i for i, wrong in enumerate(faults) if wrong), key=lambda i: len(faults[i]))

    def cards(rows: Sequence[int]) -> tuple[Card, ...]:
        shown = zip(rows, _pictures(pixels, rows), strict=True) if rows else ()
        return tuple(
            Card(
                (("", image),),
                prompts[i],
                (f"read: {in_words(readings.texts[i])}", f"wrong: {', '.join(faults[i]) or 'nothing'}"),
            )
            for i, image in shown
        )

    ask = "Compare the picture with what was read: here one sees whether the model failed or the judge."
    return [
        Gallery(f"Right in everything: {len(right)} of {len(prompts)}", "The first of them.", cards(right[:MANY])),
        Gallery("Failed in few attributes", ask, cards(failed[:MANY])),
        Gallery("Failed in most attributes", ask, cards(failed[MANY:][-MANY:][::-1])),
    ]


def misread(title: str, about: str, prompts: Sequence[str], pixels: Tensor, readings: Readings) -> Gallery:
    """Pictures whose caption is true, or was before they were reconstructed, and which the judge calls wrong.

    `about` says whose fault that is.
    """
    wrong = [i for i, each in enumerate(readings.scores) if not all(each.values())]
    shown = zip(wrong, _pictures(pixels, wrong[:MANY]), strict=False) if wrong else ()
    cards = [Card((("", image),), prompts[i], (f"read: {in_words(readings.texts[i])}",)) for i, image in shown]
    return Gallery(f"{title} that the judge misreads: {len(wrong)} of {len(prompts)}", about, tuple(cards))


def reconstructions(real: RealPictures, pixels: Tensor, psnr: Tensor) -> list[Gallery]:
    """The worst and the best by PSNR, each beside the real picture."""
    order = psnr.argsort().tolist()

    def cards(rows: Sequence[int]) -> tuple[Card, ...]:
        return tuple(
            Card(
                (("real", to_images(real.images(i, i + 1))[0]), (f"{psnr[i]:.1f} dB", image)),
                real.prompts[i],
            )
            for i, image in zip(rows, _pictures(pixels, rows), strict=True)
        )

    return [
        Gallery("Worst reconstructions", "By PSNR.", cards(order[:PAIRS])),
        Gallery("Best reconstructions", "By PSNR.", cards(order[::-1][:PAIRS])),
    ]


def neighbours(real: RealPictures, pixels: Tensor, features: Tensor, among: Tensor) -> list[Gallery]:
    """The generated pictures nearest to a real one and farthest from all, each beside its nearest real neighbour."""
    distance, found = nearest(features, among)
    order = distance.argsort().tolist()

    def cards(rows: Sequence[int]) -> tuple[Card, ...]:
        return tuple(
            Card(
                (("generated", image), ("nearest real", to_images(real.images(int(found[i]), int(found[i]) + 1))[0])),
                real.prompts[i],
                (f"distance {distance[i]:.4g}",),
            )
            for i, image in zip(rows, _pictures(pixels, rows), strict=True)
        )

    close = (
        "By distance in feature space. With its training pictures as --data, a model that repeats them shows it here."
    )
    far = "These look least like anything real to the feature network."
    return [
        Gallery("Nearest to a real picture", close, cards(order[:PAIRS])),
        Gallery("Farthest from all real pictures", far, cards(order[::-1][:PAIRS])),
    ]


def by_clip(prompts: Sequence[str], pixels: Tensor, features: Tensor, texts: Tensor) -> list[Gallery]:
    """The generated pictures that fit their prompts best and worst, as CLIP sees it."""
    fit = clip_scores(features, texts)
    order = fit.argsort(descending=True).tolist()

    def cards(rows: Sequence[int]) -> tuple[Card, ...]:
        images = zip(rows, _pictures(pixels, rows), strict=True)
        return tuple(Card((("", image),), prompts[i], (f"CLIP score {fit[i]:.1f}",)) for i, image in images)

    return [
        Gallery("Best by CLIP score", "They fit their prompts best.", cards(order[:MANY])),
        Gallery("Worst by CLIP score", "They fit their prompts least.", cards(order[::-1][:MANY])),
    ]
