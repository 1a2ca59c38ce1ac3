"""Prompts against diffusers' `encode_prompt` ("plain") and against A1111's tokens and weights ("weighted")."""

import random
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from text_encoder import TextEncoder, Tokenizer, encode_prompts
from text_encoder.clip import with_prefix
from text_encoder.prompt import emphasize, parse, plain, split_at_commas, weighted
from text_encoder.tokenizer import write_tokenizer

START, END = 49406, 49407
# The ids of whole words, from CLIP's vocabulary.
A, RED, HOUSE, TREE, SUN, SKY, ON, HILL, WORD = 320, 736, 1212, 2677, 2176, 2390, 525, 2682, 2653
COMMA, DOT, COLON, OPEN, CLOSE, CLOSE_SQUARE, BACKSLASH, EXCLAMATION = 267, 269, 281, 263, 264, 316, 315, 256
ONE, THREE = 272, 274
LITERAL, UN, BALANCED, UN_ALONE, BALANCED_ALONE = 24269, 569, 15273, 2271, 15273

CONFIG = {
    "vocab_size": 49408,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tokenizer"
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def padded_with_exclamation_marks(tokenizer: Tokenizer) -> Tokenizer:
    """Stable Diffusion 2's."""
    return Tokenizer(tokenizers.Tokenizer.from_str(tokenizer._backend.to_str()), 77, "!")


@pytest.fixture(scope="module")
def stock() -> CLIPTextModel:
    torch.manual_seed(0)
    model = CLIPTextModel(CLIPTextConfig(**CONFIG)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    if not hasattr(model, "text_model"):  # where diffusers looks for the final norm
        object.__setattr__(model, "text_model", model)
    return model


@pytest.fixture(scope="module")
def theirs(folder: Path, stock: CLIPTextModel) -> SimpleNamespace:
    """What of a pipeline its `encode_prompt` looks at."""
    return SimpleNamespace(tokenizer=CLIPTokenizer.from_pretrained(folder), text_encoder=stock)


@pytest.fixture(scope="module")
def text_encoder(stock: CLIPTextModel) -> TextEncoder:
    encoder = TextEncoder.from_transformers_config(stock.config.to_dict())
    encoder.load_state_dict(with_prefix(stock.state_dict()), strict=True)
    return encoder.requires_grad_(False)


def read(tokenizer: Tokenizer, prompt: str) -> list[tuple[list[int], list[float]]]:
    """The words of each chunk with their weights, once the rest of the chunk is seen to be what it must be."""
    chunks = []
    for ids, weights in weighted(tokenizer, prompt).chunks:
        assert len(ids) == len(weights) == 77
        end = ids.index(END)
        assert ids[0] == START
        assert set(ids[end + 1 :]) <= {tokenizer.pad_id}
        assert {weights[0], *weights[end:]} == {1.0}
        chunks.append((list(ids[1:end]), list(weights[1:end])))
    return chunks


@pytest.mark.parametrize(
    ("prompt", "ids", "weights"),
    [
        ("", [], []),
        ("a red house", [A, RED, HOUSE], [1, 1, 1]),
        ("a (red) [house]", [A, RED, HOUSE], [1, 1.1, 1 / 1.1]),
        ("a (red house:1.3), sun", [A, RED, HOUSE, COMMA, SUN], [1, 1.3, 1.3, 1, 1]),
        ("((red)) [[house]] (((tree)))", [RED, HOUSE, TREE], [1.21, 1 / 1.21, 1.331]),
        ("((red:0.5) house:2) tree", [RED, HOUSE, TREE], [1, 2, 1]),
        ("(red: 1.3 ) (house:-.5) (tree:+2) (sun:0)", [RED, HOUSE, TREE, SUN], [1.3, -0.5, 2, 0]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [A, HOUSE, ON, A, HILL, COMMA, SUN, COMMA, SKY, DOT],
            [1, 1.573, 1, 1.1, 0.55, 1.1, 1.1, 1.1, 1.4641, 1.1],
        ),
        # never closed, never opened, crossed
        ("(unbalanced", [UN, BALANCED], [1.1, 1.1]),
        ("a [red (house", [A, RED, HOUSE], [1, 1 / 1.1, 1]),
        ("red) house]", [RED, CLOSE, HOUSE, CLOSE_SQUARE], [1, 1, 1, 1]),
        ("(red [house) tree]", [RED, HOUSE, TREE], [1.1, 1, 1 / 1.1]),
        # a weight is one only before a bracket that closes
        ("(red:1.3", [RED, COLON, ONE, DOT, THREE], [1.1] * 5),
        ("red:1.3) house", [RED, COLON, ONE, DOT, THREE, CLOSE, HOUSE], [1] * 7),
        ("red:1.3", [RED, COLON, ONE, DOT, THREE], [1] * 5),
        ("(red:a)", [RED, COLON, A], [1.1] * 3),
        # escapes
        (r"\(literal\]", [OPEN, LITERAL, CLOSE_SQUARE], [1, 1, 1]),
        (r"(red \(house\):1.5)", [RED, OPEN, HOUSE, CLOSE], [1.5] * 4),
        (r"\\ red \house", [BACKSLASH, RED, HOUSE], [1, 1, 1]),
        (r"(red\)", [RED, CLOSE], [1.1, 1.1]),
        # what stands together at one weight is one word; at two weights it is two
        ("(un)(balanced)", [UN, BALANCED], [1.1, 1.1]),
        ("(r)(ed)", [RED], [1.1]),
        ("(un)balanced", [UN_ALONE, BALANCED_ALONE], [1.1, 1]),
        # Only BREAK in capitals, on its own, is one.
        ("red break", [RED, 2568], [1, 1]),
    ],
)
def test_tokens_and_weights(tokenizer: Tokenizer, prompt: str, ids: list[int], weights: list[float]) -> None:
    ((found, found_weights),) = read(tokenizer, prompt)
    assert found == ids
    assert found_weights == pytest.approx(weights)


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("red BREAK house", [[RED], [HOUSE]]),
        ("red,BREAK\nhouse", [[RED, COMMA], [HOUSE]]),
        ("BREAK red", [[], [RED]]),
        ("red BREAK", [[RED]]),
        ("red BREAK BREAK house", [[RED], [], [HOUSE]]),
        ("red BREAK BREAK", [[RED], []]),
        ("BREAK", [[]]),
        ("word " * 75 + "BREAK red", [[WORD] * 75, [RED]]),
        ("word " * 76 + "BREAK red", [[WORD] * 75, [WORD], [RED]]),
    ],
)
def test_break_begins_a_chunk(tokenizer: Tokenizer, prompt: str, chunks: list[list[int]]) -> None:
    assert [ids for ids, _ in read(tokenizer, prompt)] == chunks


def test_break_works_inside_brackets(tokenizer: Tokenizer) -> None:
    assert read(tokenizer, "(red BREAK house:1.5)") == [([RED], [1.5]), ([HOUSE], [1.5])]
    assert [ids for ids, _ in read(tokenizer, "(red) BREAKS house")] != [[RED], [HOUSE]]


@pytest.mark.parametrize(
    ("prompt", "lengths"),
    [
        ("word " * 75, [75]),
        ("word " * 76, [75, 1]),
        ("word " * 200, [75, 75, 50]),
        ("word " * 60 + ", " + "tree " * 30, [61, 30]),
        ("word " * 55 + ", " + "tree " * 30, [56, 30]),
        ("word " * 54 + ", " + "tree " * 30, [75, 10]),
        ("word " * 60 + ", tree, " + "tree " * 30, [63, 30]),
        ("word " * 74 + ", tree", [75, 1]),
        ("word " * 60 + ", " + "tree " * 14 + ", sun", [75, 2]),
        ("word " * 60 + ", " + "tree " * 74 + ", sun", [61, 75, 1]),
        ("word " * 60 + "BREAK , " + "tree " * 80, [60, 75, 6]),
    ],
)
def test_a_full_chunk_ends_at_a_comma_that_is_near(tokenizer: Tokenizer, prompt: str, lengths: list[int]) -> None:
    found = [ids for ids, _ in read(tokenizer, prompt)]
    assert [len(ids) for ids in found] == lengths
    assert list(chain.from_iterable(found)) == tokenizer.words(prompt.replace("BREAK", ""))


def token_by_token(words: Sequence[int], room: int, comma: int, reach: int = 20) -> list[list[int]]:
    """The same rule told as a program that types: on the first token too many, go back to the comma."""
    chunks: list[list[int]] = [[]]
    for word in words:
        page = chunks[-1]
        if len(page) == room:
            tail = page[-reach:]
            kept = len(page)
            if word != comma and comma in tail:
                kept -= tail[::-1].index(comma)
            chunks[-1:] = [page[:kept], page[kept:]]
        chunks[-1].append(word)
    return chunks


@pytest.mark.parametrize("room", [75, 18, 3])
def test_commas_anywhere(room: int) -> None:
    draw = random.Random(0)
    for _ in range(200):
        rarity = draw.choice([2, 10, 40])
        words = [draw.choice([COMMA] + [WORD] * rarity) for _ in range(draw.randrange(4 * room))]
        found = split_at_commas([(word, float(index)) for index, word in enumerate(words)], room, COMMA)
        assert [ids for ids, _ in found] == token_by_token(words, room, COMMA)
        assert [weight for _, weights in found for weight in weights] == [float(index) for index in range(len(words))]


def test_chunks_are_padded_as_the_model_was_trained(padded_with_exclamation_marks: Tokenizer) -> None:
    chunks = weighted(padded_with_exclamation_marks, "red! BREAK (house)").chunks
    assert chunks[0].ids == (START, RED, EXCLAMATION, END, *[0] * 73)
    assert chunks[1].ids == (START, HOUSE, END, *[0] * 74)
    assert chunks[1].weights == pytest.approx((1, 1.1, *[1] * 75))


def test_plain_reads_brackets_as_text(tokenizer: Tokenizer) -> None:
    (chunk,) = plain(tokenizer, "(red:1.3) BREAK [a|b] AND").chunks
    assert chunk.ids[1:8] == (OPEN, RED, COLON, ONE, DOT, THREE, CLOSE)
    assert set(chunk.weights) == {1.0}


PROMPTS = ["a red house", "(a:1.3) [tree] BREAK sun AND sky", "", "tree, " * 50]
NEGATIVES = ["", "a sun", "sky " * 90, "red"]


@pytest.mark.parametrize("clip_skip", [None, 0, 1, 2])
@torch.no_grad()
def test_plain_equals_diffusers(
    theirs: SimpleNamespace, text_encoder: TextEncoder, tokenizer: Tokenizer, clip_skip: int | None
) -> None:
    expected = StableDiffusionPipeline.encode_prompt(theirs, PROMPTS, "cpu", 1, True, NEGATIVES, clip_skip=clip_skip)
    ((cond, uncond),), _ = encode_prompts(text_encoder, tokenizer, PROMPTS, NEGATIVES, clip_skip=clip_skip or 0)
    torch.testing.assert_close(cond, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(uncond, expected[1], atol=1e-5, rtol=0)


def encoded(text_encoder: TextEncoder, words: list[int], weights: list[float], clip_skip: int = 0) -> Tensor:
    """One chunk's context [77,D] by the definition."""
    z = text_encoder(torch.tensor([[START, *words, *[END] * (76 - len(words))]]), clip_skip)[0]
    scaled = z * torch.tensor([1, *weights, *[1] * (76 - len(words))])[:, None]
    out: Tensor = scaled * (z.mean() / scaled.mean())
    return out


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_weighted_contexts(text_encoder: TextEncoder, tokenizer: Tokenizer, clip_skip: int) -> None:
    prompt, negative = "a (red:1.5) house BREAK [tree]", "(sky:0.3)"
    ((cond, uncond),), notices = encode_prompts(
        text_encoder, tokenizer, [prompt], [negative], syntax="weighted", clip_skip=clip_skip
    )
    wanted = [encoded(text_encoder, [A, RED, HOUSE], [1, 1.5, 1], clip_skip)]
    wanted += [encoded(text_encoder, [TREE], [1 / 1.1], clip_skip)]
    torch.testing.assert_close(cond, torch.cat(wanted)[None], atol=1e-5, rtol=0)
    unwanted = [encoded(text_encoder, [SKY], [0.3], clip_skip), encoded(text_encoder, [], [], clip_skip)]
    torch.testing.assert_close(uncond, torch.cat(unwanted)[None], atol=1e-5, rtol=0)
    assert notices == []
    assert not torch.allclose(cond[0, :77], encoded(text_encoder, [A, RED, HOUSE], [1, 1, 1], clip_skip), atol=1e-2)


def test_without_weights_the_syntaxes_agree_to_the_bit(text_encoder: TextEncoder, tokenizer: Tokenizer) -> None:
    prompts, negatives = ["a red house", "tree, " * 37], ["", "sun"]
    ours = [encode_prompts(text_encoder, tokenizer, prompts, negatives, syntax=each) for each in ("plain", "weighted")]
    for one, other in zip(ours[0].batches, ours[1].batches, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_no_prompt_depends_on_its_neighbours(text_encoder: TextEncoder, tokenizer: Tokenizer) -> None:
    prompts = ["(red:1.4)", "(red:1.4) BREAK house", "tree", "tree", "(sun:0.5) sky"]
    negatives = ["", "a", "red BREAK hill", "red BREAK hill", ""]
    for batch, sizes in ((8, [1, 3, 1]), (2, [1, 2, 1, 1])):
        together = encode_prompts(text_encoder, tokenizer, prompts, negatives, syntax="weighted", batch=batch).batches
        assert [len(cond) for cond, _ in together] == sizes
        assert [cond.shape[1] for cond, _ in together] == [77, *[154] * (len(sizes) - 2), 77]
        pairs = [pair for cond, uncond in together for pair in zip(cond, uncond, strict=True)]
        for prompt, negative, (cond, uncond) in zip(prompts, negatives, pairs, strict=True):
            ((alone, against),), _ = encode_prompts(text_encoder, tokenizer, [prompt], [negative], syntax="weighted")
            torch.testing.assert_close(cond, alone[0], atol=1e-6, rtol=0)
            torch.testing.assert_close(uncond, against[0], atol=1e-6, rtol=0)


def test_each_chunk_keeps_its_own_mean() -> None:
    torch.manual_seed(1)
    context, weights = torch.randn(3, 9, 4) + 0.1, torch.rand(3, 9) + 0.5
    out = emphasize(context, weights)
    torch.testing.assert_close(out.mean((1, 2)), context.mean((1, 2)), atol=1e-6, rtol=1e-5)
    ratio = out / (context * weights[..., None])
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio))
    assert emphasize(context.bfloat16(), weights).dtype == torch.bfloat16


def test_a_mean_that_is_rounding_is_left_alone() -> None:
    torch.manual_seed(1)
    context, weights = torch.nn.functional.layer_norm(torch.randn(2, 77, 16), [16]), torch.ones(2, 77)
    weights[:, 3] = 1.5
    torch.testing.assert_close(emphasize(context, weights), context * weights[..., None], atol=0, rtol=0)
    cancelled = emphasize(torch.ones(1, 2, 4), torch.tensor([[1.0, -1.0]]))
    assert torch.equal(cancelled, torch.tensor([1.0, -1.0])[None, :, None].expand(1, 2, 4))


def test_what_is_cut_is_told_once(text_encoder: TextEncoder, tokenizer: Tokenizer) -> None:
    long = "word " * 75
    prompts, negatives = [long + "the End", long + "the End", "red"], ["", long + "sky", ""]
    assert encode_prompts(text_encoder, tokenizer, prompts, negatives).notices == [
        "the prompt is too long; this part is left out: the End",
        "the prompt is too long; this part is left out: sky",
    ]
    assert encode_prompts(text_encoder, tokenizer, prompts, negatives, syntax="weighted", strict=True).notices == []
    with pytest.raises(ValueError, match=r"more than 75 tokens; shorten it, .* does not fit: the End; sky$"):
        encode_prompts(text_encoder, tokenizer, prompts, negatives, strict=True)
    assert encode_prompts(text_encoder, tokenizer, [long], [""], strict=True).notices == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a [red:house:0.5]", r"prompt editing, '\[red:house:0.5\]', is not supported; choose one text"),
        ("[red:0.5]", "prompt editing"),
        ("[red::5]", "prompt editing"),
        ("[red : house : .5 ] sky", "prompt editing"),
        ("[(red:1.2):house:0.5]", r"prompt editing, '\[…:house:0.5\]'"),
        ("a ([[red:house:5.]])", "prompt editing"),
        ("[red:[house:sky]:0.5]", "prompt editing"),
        ("[red|house]", r"prompt editing, '\[red\|house\]'"),
        ("a [(red:1.1)|]", "prompt editing"),
        ("red AND house", "composition of prompts by AND is not supported; write one prompt"),
        ("red :1.2 AND house :0.8", "AND"),
        ("(red:1.2.3)", "the weight '1.2.3' in the prompt is no number; write it as in "),
        ("(red:.)", "the weight '.' in the prompt is no number"),
        ("(red:10000000)", r"a weight in the prompt is 1e\+07; give at most 1e\+06"),
        (f"((red:{'9' * 400}):0)", "a weight in the prompt is nan"),
        ("(" * 300 + "red", "a weight in the prompt is 2.6"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    text_encoder: TextEncoder, tokenizer: Tokenizer, prompt: str, message: str
) -> None:
    for prompts, negatives in (([prompt], [""]), (["red"], [prompt])):
        with pytest.raises(ValueError, match=message):
            encode_prompts(text_encoder, tokenizer, prompts, negatives, syntax="weighted")
    assert encode_prompts(text_encoder, tokenizer, [prompt], [""]).batches  # plain text


@pytest.mark.parametrize(
    ("prompt", "sections"),
    [
        ("[red:house]", [[("red:house", 1 / 1.1)]]),
        ("[red:0.5", [[("red:0.5", 1 / 1.1)]]),
        (r"\[red|house\]", [[("[red|house]", 1)]]),
        (r"[red\|house]", [[("red|house", 1 / 1.1)]]),
        ("(red|house)", [[("red|house", 1.1)]]),
        ("red|house", [[("red|house", 1)]]),
        ("[(red:0.5)]", [[("red", 0.5 / 1.1)]]),
        ("[(red|house)]", [[("red|house", 1)]]),
        ("BAND and SANDY", [[("BAND and SANDY", 1)]]),
        ("UNBREAKABLE", [[("UNBREAKABLE", 1)]]),
    ],
)
def test_what_only_looks_like_it_is_text(prompt: str, sections: list[list[tuple[str, float]]]) -> None:
    assert [[(text, pytest.approx(weight)) for text, weight in section] for section in sections] == parse(prompt)


def test_any_text_has_a_meaning_or_is_refused(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    parts = ["(", ")", "[", "]", ":", "1.3", "\\", ",", "|", " BREAK ", "red", "\n", "é", "\ud800", "…"]
    refused = 0
    for _ in range(300):
        prompt = "".join(draw.choices(parts, k=draw.randrange(30)))
        try:
            assert weighted(tokenizer, prompt).chunks
        except ValueError:
            refused += 1
    assert 0 < refused < 200


def test_an_unknown_syntax_is_an_error(text_encoder: TextEncoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="prompt syntax 'a1111' is unknown; there are plain, weighted"):
        encode_prompts(text_encoder, tokenizer, ["red"], [""], syntax="a1111")


def test_skipping_every_layer_is_an_error(text_encoder: TextEncoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="clip_skip is 3; this text encoder has 3 layers: give 0 to 2"):
        encode_prompts(text_encoder, tokenizer, ["red"], [""], clip_skip=3)
