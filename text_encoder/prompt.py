r"""What a prompt's text means: tokens, their weights, and the two contexts that guidance compares.

Syntax "plain" is diffusers': every character is text, and what the text encoder has no position for is cut. CLIP-skip
then holds for the prompt and not for the negative prompt, as in diffusers.

Syntax "weighted" is that of AUTOMATIC1111's stable-diffusion-webui, with its "Original" emphasis:

    (a)            multiplies the weight of a by 1.1
    (a:1.3)        multiplies it by 1.3
    [a]            divides it by 1.1
    \( \) \[ \] \\ are the characters themselves; any other backslash is dropped
    a BREAK b      begins a new chunk with b

Brackets nest. One that is never closed reaches to the end; one that was never opened is text, as is a weight outside
round brackets. A prompt of any length becomes chunks of as many tokens as the text encoder has positions for, each
encoded on its own. BREAK works inside brackets too, where that program reads a word of negative weight. CLIP-skip
holds for both prompts (its "Clip skip" is ours plus 1). Prompt editing, `[from:to:0.5]` or `[a|b]`, and composition
by `AND` are refused.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from text_encoder.clip import TextEncoder
from text_encoder.tokenizer import Tokenizer

COMMA_REACH = 20  # a full chunk ends at the last comma among this many of its last tokens, if there is one
MAX_WEIGHT = 1e6
CLOSING = {")": ("(", 1.1), "]": ("[", 1 / 1.1)}
SYMBOLS = re.compile(r"\\[()\[\]\\]?|[(\[\])]|:\s*(?P<factor>[+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:")
BREAK = re.compile(r"\bBREAK\b")
COMPOSITION = re.compile(r"\bAND\b")
INNERMOST = re.compile(r"\([^()\[\]]*\)|\[(?P<inside>[^()\[\]]*)\]")
EDITING = re.compile(r"\||:\s*[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?\s*$", re.IGNORECASE)


class Chunk(NamedTuple):
    """What the text encoder takes at once."""

    ids: tuple[int, ...]
    """Start, words, end, padding."""
    weights: tuple[float, ...]
    """Of each position; 1 for all but words."""


Pair = tuple[list[Chunk], list[Chunk]]  # a prompt and its negative prompt


class Meaning(NamedTuple):
    """What one text means."""

    chunks: list[Chunk]
    cut: str
    """What did not fit, empty if all did."""


class Contexts(NamedTuple):
    """Prompts as the U-Net takes them."""

    batches: list[tuple[Tensor, Tensor]]
    """(cond, uncond), both [b,L,D], in the order of the prompts. L differs between batches, never within one."""
    notices: list[str]
    """One line for each text that was cut."""


@torch.no_grad()
def encode_prompts(
    text_encoder: TextEncoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    negatives: Sequence[str],
    *,
    syntax: str = "plain",
    clip_skip: int = 0,
    strict: bool = False,
    batch: int = 8,
) -> Contexts:
    """The contexts of each prompt and its negative prompt.

    The shorter of the two is padded with chunks of no words, which is all that reaches from one text to another: a
    prompt's context depends on no other prompt.

    Args:
        negatives: one for each prompt, "" for none.
        clip_skip: how many of the text encoder's last layers to leave out.
        strict: refuse a text that would be cut.
        batch: how many chunks are encoded, and how many prompts are put together, at once.

    Raises:
        ValueError: one line that names the syntax, the layers, or the part of a prompt that is cut or not understood.
    """
    if syntax not in SYNTAXES:
        raise ValueError(f"prompt syntax {syntax!r} is unknown; there are {', '.join(SYNTAXES)}")
    read = SYNTAXES[syntax]
    meanings = {text: read(tokenizer, text) for text in (*prompts, *negatives)}
    cut = list(dict.fromkeys(meaning.cut for meaning in meanings.values() if meaning.cut))
    if strict and cut:
        raise ValueError(
            f"the prompt has more than {tokenizer.room} tokens; shorten it, or use the syntax 'weighted'."
            f" This does not fit: {'; '.join(cut)}"
        )
    (empty,) = read(tokenizer, "").chunks
    pairs = []
    for prompt, negative in zip(prompts, negatives, strict=True):
        given, avoided = meanings[prompt].chunks, meanings[negative].chunks
        length = max(len(given), len(avoided))
        pairs.append((given + [empty] * (length - len(given)), avoided + [empty] * (length - len(avoided))))
    cond = _encode(text_encoder, (given for given, _ in pairs), clip_skip, batch)
    uncond = _encode(text_encoder, (avoided for _, avoided in pairs), 0 if syntax == "plain" else clip_skip, batch)
    batches = [
        (_join((given for given, _ in some), cond), _join((avoided for _, avoided in some), uncond))
        for some in _of_one_length(pairs, batch)
    ]
    return Contexts(batches, [f"the prompt is too long; this part is left out: {part}" for part in cut])


def plain(tokenizer: Tokenizer, text: str) -> Meaning:
    """One chunk, in which all weights are 1."""
    ids, cut = tokenizer([text])
    row = tuple(ids[0].tolist())
    return Meaning([Chunk(row, (1.0,) * len(row))], cut[0])


def weighted(tokenizer: Tokenizer, text: str) -> Meaning:
    """As many chunks as the text needs; nothing is cut. Raises ValueError as `parse` does."""
    sections = [
        [(word, weight) for piece, weight in section for word in tokenizer.words(piece)] for section in parse(text)
    ]
    if len(sections) > 1 and not sections[-1]:
        sections.pop()  # after a BREAK at the very end there is nothing to begin
    chunks = []
    for words in sections:
        for ids, weights in split_at_commas(words, tokenizer.room, tokenizer.comma_id):
            row = tokenizer.row(ids)
            padding = len(row) - 1 - len(weights)
            chunks.append(Chunk(tuple(row), (1.0, *weights, *[1.0] * padding)))
    return Meaning(chunks, cut="")


SYNTAXES: Mapping[str, Callable[[Tokenizer, str], Meaning]] = {"plain": plain, "weighted": weighted}


def parse(prompt: str) -> list[list[tuple[str, float]]]:
    """The sections between one BREAK and the next: pieces of text with their weights, joined where these are equal.

    Raises:
        ValueError: prompt editing, composition, or a weight that is no number or too large.
    """
    _refuse_editing(prompt)
    texts: list[str | None] = []  # None is a BREAK
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for match in SYMBOLS.finditer(prompt):
        symbol = match[0]
        opening, factor = CLOSING.get(symbol[-1], ("", 1.0))
        if symbol[0] == "\\":
            texts.append(symbol[1:])
        elif symbol in opened:
            opened[symbol].append(len(texts))
        elif opening and opened[opening]:
            multiply(opened[opening].pop(), _number(match["factor"]) if match["factor"] else factor)
        else:
            first, *others = BREAK.split(symbol)
            texts += [first, *(text for other in others for text in (None, other))]
        weights += [1.0] * (len(texts) - len(weights))
    for opening, factor in CLOSING.values():
        for start in opened[opening]:
            multiply(start, factor)
    for weight in weights:
        if not abs(weight) <= MAX_WEIGHT:
            raise ValueError(f"a weight in the prompt is {weight:g}; give at most {MAX_WEIGHT:g}")

    sections: list[list[tuple[str, float]]] = [[]]
    for text, weight in zip(texts, weights, strict=True):
        if text is None:
            sections.append([])
        elif sections[-1] and sections[-1][-1][1] == weight:  # words are made of what stands together
            sections[-1][-1] = (sections[-1][-1][0] + text, weight)
        else:
            sections[-1].append((text, weight))
    return sections


def split_at_commas(
    words: Sequence[tuple[int, float]], room: int, comma_id: int | None
) -> list[tuple[list[int], list[float]]]:
    """Ids with their weights in chunks of at most `room`, at least one.

    A chunk that is full ends after the last comma among its last 20 tokens, so that no phrase is torn apart, unless
    the next token is a comma itself.
    """
    chunks = []
    start = 0
    while True:
        end = start + room
        if end < len(words) and words[end][0] != comma_id:
            near = range(end - 1, max(start, end - COMMA_REACH) - 1, -1)
            end = next((index + 1 for index in near if words[index][0] == comma_id), end)
        some = words[start:end]
        chunks.append(([word for word, _ in some], [weight for _, weight in some]))
        if end >= len(words):
            return chunks
        start = end


def emphasize(context: Tensor, weights: Tensor) -> Tensor:
    """Contexts [N,L,D] times weights [N,L], then scaled so that each of the N keeps its mean over L and D.

    The mean is each chunk's own: over a whole batch, a prompt's picture would depend on its neighbours. A mean that is
    mere rounding, as where the final norm has no bias, cannot be restored and is left alone.
    """
    scaled = context.float() * weights[..., None]
    before, after = (each.float().mean((1, 2), keepdim=True) for each in (context, scaled))
    rounding = 1e-6 * scaled.abs().mean((1, 2), keepdim=True)
    known = torch.minimum(before.abs(), after.abs()) > rounding
    return (scaled * torch.where(known, before / after, 1.0)).to(context.dtype)


def _encode(text_encoder: TextEncoder, texts: Iterable[list[Chunk]], clip_skip: int, batch: int) -> dict[Chunk, Tensor]:
    """The context [L,D] of each distinct chunk."""
    chunks = list(dict.fromkeys(chain.from_iterable(texts)))
    device = next(text_encoder.parameters()).device
    ids = torch.tensor([chunk.ids for chunk in chunks], device=device)
    weights = torch.tensor([chunk.weights for chunk in chunks], device=device)
    contexts = [
        emphasize(text_encoder(some_ids, clip_skip), some_weights)
        for some_ids, some_weights in zip(torch.split(ids, batch), torch.split(weights, batch), strict=True)
    ]
    return dict(zip(chunks, torch.cat(contexts), strict=True))


def _of_one_length(pairs: list[Pair], batch: int) -> Iterator[list[Pair]]:
    """The pairs in their order, at most `batch` at once and never two of different length together."""
    for _, run in groupby(pairs, key=lambda pair: len(pair[0])):
        alike = list(run)
        yield from (alike[start : start + batch] for start in range(0, len(alike), batch))


def _join(texts: Iterable[list[Chunk]], encoded: Mapping[Chunk, Tensor]) -> Tensor:
    return torch.stack([torch.cat([encoded[chunk] for chunk in chunks]) for chunks in texts])


def _refuse_editing(prompt: str) -> None:
    if COMPOSITION.search(prompt):
        raise ValueError(
            "composition of prompts by AND is not supported; write one prompt, with 'and' in small letters"
        )
    # From the inside out: what a bracket holds in a bracket of its own is not its own "|" or ":".
    flat, found = re.sub(r"\\.?", "", prompt, flags=re.DOTALL), 1
    while found:
        for match in INNERMOST.finditer(flat):
            if EDITING.search(match["inside"] or ""):
                raise ValueError(
                    f"prompt editing, {match[0]!r}, is not supported; choose one text, or write \\[ for a bracket"
                )
        flat, found = INNERMOST.subn("…", flat)


def _number(factor: str) -> float:
    try:
        return float(factor)
    except ValueError:
        raise ValueError(f"the weight {factor!r} in the prompt is no number; write it as in (text:1.3)") from None
