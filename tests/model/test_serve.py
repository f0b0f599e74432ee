"""Other engines: what a prompt's embeddings give transformers' own model, and docs/serve.md's script."""

import re
import runpy
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from commands import ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import srreal
import train_sft
from errors import UserError
from model import prompt_embeds, tiny
from model.processor import Processor
from model.prompt_embeds import Config, embed_prompt, main
from model.qwen_vl import QwenVL
from srreal import Example

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
BOX = (20, 10, 90, 70)


def example() -> Example:
    """A region of a picture with depth."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (96, 128, 3), np.uint8))
    depth = rng.uniform(1, 5, (96, 128)).astype(np.float32)
    question = "How far is the chair (red bbox <mask>)?"
    asked = Example("a", "lor", [picture], question, "2", depths=[depth], regions=[(0, BOX)])
    return replace(asked, intrinsics=[(100.0, 100.0, 63.5, 47.5)])


@pytest.fixture(scope="module", params=FAMILIES)
def served(request, tmp_path_factory):
    """(our model, its processor, transformers' model): one checkpoint whose depth says something."""
    folder = tmp_path_factory.mktemp(request.param)
    shape = tiny.tiny_shape(request.param)
    shape.scenes = 10
    shape.vocabulary = 600
    tiny.write(request.param, folder / "a", shape=shape)
    model = QwenVL.from_pretrained(folder / "a", dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in (*model.points.parameters(), *model.region.parameters()):
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder / "b")
    theirs = AutoModelForImageTextToText.from_pretrained(folder / "b", dtype=torch.float32).eval()
    model = QwenVL.from_pretrained(folder / "b", dtype=torch.float32)
    return model, Processor.from_pretrained(folder / "b"), theirs


@torch.no_grad()
def our_logits(model, processor, asked) -> torch.Tensor:
    return model.hidden(processor([asked])) @ model.head_weight.T


@torch.no_grad()
def their_logits(theirs, tensors: dict, positions: torch.Tensor, deepstack: bool) -> torch.Tensor:
    """The logits (T, V) of transformers' decoder for embeddings (T, H) at positions (3, T)."""
    extra = {}
    width = tensors["prompt_embeds"].shape[1]
    levels = tensors["image_embeds"].split(width, 1)[1:]
    if deepstack and levels:
        is_image = torch.zeros(1, len(tensors["input_ids"]), dtype=torch.bool)
        is_image[0, tensors["image_at"]] = True
        extra = {"visual_pos_masks": is_image, "deepstack_visual_embeds": list(levels)}
    hidden = theirs.model.language_model(
        inputs_embeds=tensors["prompt_embeds"][None], position_ids=positions[:, None], **extra
    )
    return theirs.lm_head(hidden.last_hidden_state)[0]


def test_the_embeddings_carry_the_prompt_but_for_positions_and_deepstack(served):
    model, processor, theirs = served
    tensors = embed_prompt(model, processor, example())
    ours = our_logits(model, processor, example())
    mrope = tensors["position_ids"]
    assert (their_logits(theirs, tensors, mrope, True) - ours).abs().max() < 1e-4
    # What docs/serve.md says of prompt_embeds alone: positions of a text, and no deepstack.
    text = torch.arange(len(ours)).expand(3, -1)
    assert (their_logits(theirs, tensors, text, True) - ours)[-1].abs().max() > 1e-3
    has_deepstack = tensors["image_embeds"].shape[1] > tensors["prompt_embeds"].shape[1]
    assert has_deepstack == (theirs.config.model_type == "qwen3_vl")
    without = (their_logits(theirs, tensors, mrope, False) - ours)[-1].abs().max()
    assert without > 1e-3 if has_deepstack else without < 1e-4


def test_the_parts_make_the_prompt(served):
    """Text by ids, the image's and the regions' embeddings, and positions by transformers: enough."""
    model, processor, theirs = served
    tensors = embed_prompt(model, processor, example())
    ids = tensors["input_ids"]
    is_image = ids == processor.image_token_id
    with torch.no_grad():
        embeds = theirs.get_input_embeddings()(ids)
        positions, _ = theirs.model.get_rope_index(
            ids[None], is_image[None].int(), image_grid_thw=tensors["image_grid_thw"]
        )
    embeds[is_image] = tensors["image_embeds"][:, : embeds.shape[1]]
    (place,) = tensors["region_at"].tolist()
    assert ids[place] == processor.mask_id
    embeds[place] = tensors["region_embeds"][0]
    found = their_logits(theirs, tensors | {"prompt_embeds": embeds}, positions[:, 0], True)
    assert (found - our_logits(model, processor, example())).abs().max() < 1e-4


def test_region_and_depth_are_in_the_embeddings(served):
    model, processor, theirs = served
    asked = example()
    whole = embed_prompt(model, processor, asked)
    elsewhere = embed_prompt(model, processor, replace(asked, regions=[(0, (90, 60, 120, 90))]))
    flat = embed_prompt(model, processor, replace(asked, depths=None))
    mask = (whole["input_ids"] == processor.mask_id).nonzero()[:, 0]

    def changed(other) -> list[int]:
        differs = (other["prompt_embeds"] != whole["prompt_embeds"]).any(1)
        return differs.nonzero()[:, 0].tolist()

    assert changed(elsewhere) == mask.tolist()
    assert changed(flat) == sorted([*whole["image_at"].tolist(), *mask.tolist()])
    # Without depth the image's embeddings are transformers' own, deepstack's levels behind.
    batch = processor([asked])
    with torch.no_grad():
        found = theirs.model.get_image_features(batch.pixel_values, batch.image_grid_thw)
    pieces = [torch.cat(list(found.pooler_output))]
    if flat["image_embeds"].shape[1] > pieces[0].shape[1]:
        pieces += [
            torch.cat(list(level)) if type(level) is tuple else level
            for level in found.deepstack_features
        ]
    assert (flat["image_embeds"] - torch.cat(pieces, 1)).abs().max() < 1e-4
    assert flat["image_grid_thw"].tolist() == batch.image_grid_thw.tolist()
    text = replace(asked, images=[], depths=None, intrinsics=None, regions=[], question="Hello?")
    assert embed_prompt(model, processor, text).keys() == {
        *("prompt_embeds", "position_ids", "input_ids")
    }


def test_the_command_writes_them(tiny_home, tmp_path, capsys):
    asked = example()
    asked.images[0].save(tmp_path / "a.png")
    out = tmp_path / "prompt.safetensors"
    common = dict(image=str(tmp_path / "a.png"), question=asked.question, region=(BOX,))
    cfg = Config(str(tiny_home / "tiny"), out=str(out), path="dtr", **common)
    main(cfg)
    assert "no depth" in capsys.readouterr().out
    model = QwenVL.from_pretrained(tiny_home / "tiny")
    processor = Processor.from_pretrained(tiny_home / "tiny")
    asked = replace(asked, path="dtr", depths=None, intrinsics=None)
    wanted = embed_prompt(model, processor, asked)
    written = load_file(out)
    assert written.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(written[name], tensor), name
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"text": srreal.prompt(asked)}
    with pytest.raises(UserError, match=".safetensors"):
        replace(cfg, out="prompt.pt")
    with pytest.raises(UserError, match="--region 0 0 999 9"):
        main(replace(cfg, region=((0, 0, 999, 9),), out=str(tmp_path / "b.safetensors")))
    with pytest.raises(UserError, match="can't write"):
        main(replace(cfg, out=str(tmp_path / "none" / "b.safetensors")))
    assert not (tmp_path / "b.safetensors").exists()


def test_the_script_of_the_docs_asks_a_checkpoint(tiny_home, tmp_path, monkeypatch, capsys):
    """Its prompt and pixels are ours at --regions text, and so is the first token that it writes."""
    data = (str(tiny_home / "scenes" / "rows.jsonl"),)
    flags = dict(steps=1, batch=2, regions="text", warmup=0)
    train_sft.main(train_sft.Config(str(tiny_home / "tiny"), data, str(tmp_path / "sft"), **flags))
    checkpoint = tmp_path / "sft" / "step-000001"
    processor = Processor.from_pretrained(checkpoint, regions="text")
    model = QwenVL.from_pretrained(checkpoint, regions="text")
    asked = replace(example(), depths=None, intrinsics=None)
    asked.images[0].save(tmp_path / "a.png")

    # As the docs say it: the box in thousandths of the image, in the place of <mask>.
    box = '{"bbox_2d": [156, 104, 703, 729]}'
    turn = srreal.prompt(asked).replace("<mask>", box)
    calls = []
    real = transformers.GenerationMixin.generate

    def generate(self, **inputs):
        calls.append(inputs | {"written": real(self, **inputs | {"max_new_tokens": 2})})
        return calls[-1]["written"]

    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)
    script = ROOT / "docs" / "serve_transformers.py"
    monkeypatch.setattr(sys, "argv", [script.name, str(checkpoint), str(tmp_path / "a.png"), turn])
    capsys.readouterr()
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip() != ""
    (inputs,) = calls
    batch = processor([asked])
    assert inputs["input_ids"][0].tolist() == batch.input_ids.tolist()
    assert (inputs["pixel_values"] - batch.pixel_values).abs().max() < 1e-5
    first = our_logits(model, processor, asked)[-1].argmax()
    assert inputs["written"][0, len(batch.input_ids)] == first


def test_the_docs_say_what_runs():
    page = (ROOT / "docs" / "serve.md").read_text()
    code = (ROOT / "docs" / "serve_transformers.py").read_text()
    assert code[code.index("import sys") :] in page
    asked = Example("a", "lor", [None], "QUESTION", "")
    assert srreal.prompt(asked) in page
    # Each tensor that the command's help names.
    for name in re.findall(r"^    (\w+_\w+)  +\(", prompt_embeds.__doc__, re.M):
        assert f"| `{name}` |" in page
