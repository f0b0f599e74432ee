"""The tiny checkpoint: transformers runs it, its tokenizer keeps any text, the seed fixes every
byte."""

import contextlib
import io
import json
import unicodedata
from statistics import mean

import pytest
import torch
from safetensors.torch import load
from tiny_checkpoint import FAMILIES, checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from model import tiny
from model.processor import Processor


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_it_and_runs_it_on_an_image(family):
    out = checkpoint(family)
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.model_type == family and sum(p.numel() for p in model.parameters()) < 2e6
    grid = torch.tensor([[1, 4, 6]])
    ids = torch.tensor(
        [[5, model.config.vision_start_token_id, *[model.config.image_token_id] * 6, 7]]
    )
    kinds = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            pixel_values=torch.randn(24, 3 * 2 * 8 * 8),
            image_grid_thw=grid,
            mm_token_type_ids=kinds,
        ).logits
    assert logits.shape == (1, 9, model.config.text_config.vocab_size) and logits.isfinite().all()


def test_numbers_start_near_numbers_of_about_their_value():
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("qwen3_vl"))
    model = AutoModelForImageTextToText.from_pretrained(checkpoint("qwen3_vl"))
    table = model.get_input_embeddings().weight
    directions = torch.nn.functional.normalize(table.detach(), dim=1)

    def nearness(left: str, right: str) -> float:
        ids = [tokenizer.encode(text) for text in (left, right)]
        assert [len(one) for one in ids] == [1, 1]
        return float(directions[ids[0][0]] @ directions[ids[1][0]])

    neighbours = []
    others = []
    for tenths in range(-20, 50):
        number, near, further = (f"{(tenths + more) / 10:.1f}" for more in (0, 1, 8))
        neighbours.append(nearness(number, near))
        others.append(nearness(number, further))
    assert all(near > further for near, further in zip(neighbours, others, strict=True))
    # Each has noise of its own, so only the means are sure.
    assert mean(neighbours) > 0.6 and mean(others) < 0.5
    # Words don't start near anything.
    assert abs(nearness(" left", " right")) < 0.4


@pytest.mark.parametrize("family", FAMILIES)
def test_there_are_spare_rows_and_the_special_tokens_of_qwen(family):
    out = checkpoint(family)
    tokenizer, config = AutoTokenizer.from_pretrained(out), AutoConfig.from_pretrained(out)
    assert (
        len(tokenizer)
        == max(tokenizer.get_vocab().values()) + 1
        <= config.text_config.vocab_size - 15
    )
    added = {t.content: t.special for t in tokenizer.added_tokens_decoder.values()}
    assert all(added[token] and len(tokenizer(token).input_ids) == 1 for token in tiny.SPECIAL)
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config.image_token_id
    assert (
        "<mask>" not in tiny.tokenizer(family).get_vocab()
    )  # the first spare row is the processor's to take
    assert tokenizer.convert_tokens_to_ids("<mask>") == len(tokenizer) - 1
    assert [added.get(t) for t in ("<think>", "</think>")] == (
        [False] * 2 if family in ("qwen3_vl", "qwen3_5") else [None] * 2
    )


TEXTS = (
    "",
    " ",
    "\n\n\t \r\n",
    "plain words, and  two  spaces",
    "Größe 日本語 🙂👩‍🚀 e\u0301 \u00a0\u200b",
    "<think>a</think>\n<answer>B</answer>",
    'Find 2 relevant objects:\n<3d_box center="0.3,-0.81,3.32">chair (red bbox)</3d_box>',
    "-12.345e6 +.5 1.2.3 x-2.4",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_text_round_trips(family):
    processor = Processor.from_pretrained(checkpoint(family))
    for text in (*TEXTS, "".join(chr(c) for c in range(1, 3000) if not 0xD800 <= c < 0xE000)):
        if family == "qwen3_5":
            # Its tokenizer composes letters and their marks.
            text = unicodedata.normalize("NFC", text)
        assert processor.decode(processor.encode(text)) == text
        assert processor.decode([*processor.encode(text), processor.end_id]) == text


def test_numbers_of_one_decimal_are_one_token_and_further_digits_one_each():
    processor = Processor.from_pretrained(checkpoint("qwen3_vl"))
    pieces = lambda text: [processor.decode([i]) for i in processor.encode(text)]  # noqa: E731
    for tenth in range(100):
        assert pieces(f"{tenth / 10}") == [f"{tenth / 10}"] and pieces(f"-{tenth / 10}") == [
            f"-{tenth / 10}"
        ]
        assert pieces(f"red {tenth / 10}") == ["red", f" {tenth / 10}"]
    assert pieces("-2.43") == ["-2.4", "3"]
    line = '<3d_box center="0.31,-0.8,3.32">chair (red bbox)</3d_box>\n</detect>'
    assert pieces(line) == [
        '<3d_box center="',
        "0.3",
        "1",
        ",",
        "-0.8",
        ",",
        "3.3",
        "2",
        '">',
        "chair",
        " (",
        "red",
        " bbox",
        ")",
        "</3d_box>\n",
        "</detect>",
    ]


def test_the_tokenizer_is_the_same_after_save_and_load(tmp_path):
    first = AutoTokenizer.from_pretrained(checkpoint("qwen3_vl"))
    first.save_pretrained(tmp_path)
    second = AutoTokenizer.from_pretrained(tmp_path)
    assert [first(t).input_ids for t in TEXTS] == [second(t).input_ids for t in TEXTS]
    raw = json.loads((checkpoint("qwen3_vl") / "tokenizer.json").read_text())
    assert raw["pre_tokenizer"] == json.loads(second.backend_tokenizer.to_str())["pre_tokenizer"]
    assert first.chat_template == second.chat_template


def test_the_seed_decides_every_byte(tmp_path):
    with contextlib.redirect_stderr(io.StringIO()):
        tiny.write("qwen3_vl", again := tmp_path / "again", 0)
        tiny.write("qwen3_vl", other := tmp_path / "other", 1)
    files = [
        {p.name: p.read_bytes() for p in folder.iterdir()}
        for folder in (checkpoint("qwen3_vl"), again, other)
    ]
    for each in files:  # safetensors writes its metadata in no fixed order: compare what it holds
        each["spatial.safetensors"] = {
            k: v.tolist() for k, v in load(each["spatial.safetensors"]).items()
        }
    assert files[0] == files[1]
    assert {name for name in files[0] if files[0][name] != files[2][name]} == {
        "model.safetensors",
        "spatial.safetensors",
    }


def test_the_point_map_is_heard_from_the_start():
    spatial = load((checkpoint("qwen3_vl") / "spatial.safetensors").read_bytes())
    assert all(t.isfinite().all() for t in spatial.values())
    assert any(
        name.startswith("points.") and t.abs().max() > 0
        for name, t in spatial.items()
        if "down" in name
    )
