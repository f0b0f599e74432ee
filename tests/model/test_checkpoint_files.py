"""The files of a checkpoint against transformers' own AutoProcessor and from_pretrained: templates,
weights, heads, vocabularies, image settings, permissions, runs."""

import json
import os
import shutil
import stat

import numpy as np
import pytest
import torch
from hub import (
    PUBLISHED,
    TEXT_ONLY,
    edit_json,
    published,
    split_weights,
    transformers_processor,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoint import FAMILIES, checkpoint
from tiny_models import inputs, make, reference_logits
from transformers import AutoModelForImageTextToText, AutoTokenizer

from model import tiny
from model.checkpoint import save_tensors
from model.files import CheckpointError, checkpoint_of
from model.processor import Processor
from model.qwen_vl import QwenVL
from srreal import Example, prompt

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
TEMPLATE = "{% for m in messages %}NAME{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"


def example(**changes) -> Example:
    fields = dict(images=[PICTURE], question="What is it?", answer="A")
    return Example(**dict(id="row 7", path="lor") | fields | changes)


def with_region() -> Example:
    return example(
        question="Where is the chair (red bbox <mask>)?",
        regions=[(0, (3, 4, 20, 30))],
        objects={"red bbox": (0.0, 0.0, 2.0)},
    )


def their_prompt(folder, e: Example) -> str:
    """What transformers' processor makes of the user turn that ours stands for."""
    content = [{"type": "image"}] * len(e.images) + [{"type": "text", "text": prompt(e)}]
    chat = [{"role": "user", "content": content}]
    return transformers_processor(folder).apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )


def our_prompt(p: Processor, e: Example) -> str:
    """Our prompt's text, with one placeholder an image again."""
    ids = p.prompt_ids(e)
    first = ids.index(p.image_token_id) if p.image_token_id in ids else len(ids)
    rest = [i for i in ids[first:] if i != p.image_token_id]
    return p.tokenizer.decode(ids[:first] + [p.image_token_id] * (first < len(ids)) + rest)


# ---- chat templates ----


@pytest.mark.parametrize("family", FAMILIES)
def test_published_folders_give_transformers_prompt_before_and_after_saving(family, tmp_path):
    folder = published(family, tmp_path / "hub")
    p = Processor.from_pretrained(folder)
    model = QwenVL.from_pretrained(folder)
    e = example()
    assert our_prompt(p, e) == their_prompt(folder, e)
    saves = {
        "with": lambda out: model.save_pretrained(out, p),
        "without": lambda out: model.save_pretrained(out),
    }
    for name, save in saves.items():
        out = tmp_path / name
        save(out)
        assert their_prompt(out, e) == their_prompt(folder, e)
        assert Processor.from_pretrained(out).prompt_ids(e) == p.prompt_ids(e)
        kept = PUBLISHED[family] - {"model.safetensors.index.json"}
        assert kept <= {path.name for path in out.iterdir()}
        # The tokenizer alone gives the same prompt, for those who ask no processor.
        chat = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
        alone = AutoTokenizer.from_pretrained(out).apply_chat_template(chat, tokenize=False)
        assert alone == transformers_processor(out).apply_chat_template(chat, tokenize=False)


def named(**templates: str) -> list[dict]:
    return [{"name": name, "template": text} for name, text in templates.items()]


def template(name: str) -> str:
    return TEMPLATE.replace("NAME", name)


# Where a template may stand -> how it gets there; the order is that of transformers.
PLACES = {
    "processor_config.json": lambda folder: edit_json(
        folder / "processor_config.json", chat_template=template("processor_config.json")
    ),
    "chat_template.json": lambda folder: edit_json(
        folder / "chat_template.json", chat_template=template("chat_template.json")
    ),
    "chat_template.jinja": lambda folder: (folder / "chat_template.jinja").write_text(
        template("chat_template.jinja")
    ),
    "tokenizer_config.json": lambda folder: edit_json(
        folder / "tokenizer_config.json", chat_template=template("tokenizer_config.json")
    ),
}


@pytest.mark.parametrize("first", list(PLACES))
def test_of_several_templates_the_one_counts_that_transformers_takes(first, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(checkpoint("qwen3_vl"), folder)
    (folder / "chat_template.jinja").unlink()
    for place in list(PLACES)[list(PLACES).index(first) :]:
        PLACES[place](folder)
    p = Processor.from_pretrained(folder)
    e = example(images=[])
    assert our_prompt(p, e).startswith(first)
    if first != "tokenizer_config.json":  # of the tokenizer's, their processor knows nothing
        assert our_prompt(p, e) == their_prompt(folder, e)
    p.save(tmp_path / "out")
    assert their_prompt(tmp_path / "out", e) == our_prompt(p, e)
    assert Processor.from_pretrained(tmp_path / "out").prompt_ids(e) == p.prompt_ids(e)


def test_named_templates(tmp_path):
    e = example(images=[])
    for k, legacy in enumerate((False, True)):
        folder = tmp_path / f"listed {k}"
        shutil.copytree(checkpoint("qwen3_vl"), folder)
        (folder / "chat_template.jinja").unlink()
        both = named(default=template("mine"), tool_use=TEXT_ONLY)
        edit_json(folder / "tokenizer_config.json", chat_template=both)
        if legacy:
            edit_json(folder / "chat_template.json", chat_template=template("legacy"))
        p = Processor.from_pretrained(folder)
        assert our_prompt(p, e).startswith("legacy" if legacy else "mine")
        p.save(tmp_path / f"listed {k} out")
        assert their_prompt(tmp_path / f"listed {k} out", e) == our_prompt(p, e)
        again = AutoTokenizer.from_pretrained(tmp_path / f"listed {k} out")
        assert again.chat_template["tool_use"] == TEXT_ONLY

    folder = tmp_path / "folder"
    shutil.copytree(checkpoint("qwen3_vl"), folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text(TEXT_ONLY)
    p = Processor.from_pretrained(folder)
    assert our_prompt(p, e) == their_prompt(folder, e)
    QwenVL.from_pretrained(folder).save_pretrained(tmp_path / "out", p)
    assert transformers_processor(tmp_path / "out").chat_template["rag"] == TEXT_ONLY
    # Those of an older save must not outlive it.
    plain = Processor.from_pretrained(checkpoint("qwen3_vl"))
    QwenVL.from_pretrained(checkpoint("qwen3_vl")).save_pretrained(tmp_path / "out", plain)
    assert not (tmp_path / "out" / "additional_chat_templates").exists()

    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"templates rag, and none named default$"):
        Processor.from_pretrained(folder)
    PLACES["chat_template.json"](folder)
    with pytest.raises(CheckpointError, match=r"conflicting files[^\n]*$"):
        Processor.from_pretrained(folder)
    (folder / "chat_template.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"chat_template.json: no 'chat_template' in it$"):
        Processor.from_pretrained(folder)


BAD_TEMPLATES = {
    "of texts alone": (TEXT_ONLY, r"none for images; .*\(can only concatenate str"),
    "of other text": ("{{ messages[0].content.strip() }}", r"none for images; .*'strip'"),
    "that refuses": ("{{ raise_exception('no lists') }}", r"none for images; .*\(no lists\)"),
    "torn": ("{% for m in messages %}", "none for images; .*endfor"),
    "without a place for images": (
        TEMPLATE,
        r"none for images; .*\(0 places for 1 images, of token \d+\)",
    ),
    "a list": (named(default=TEMPLATE), "its chat template is a list, and no text"),
}


@pytest.mark.parametrize("case", list(BAD_TEMPLATES))
def test_a_template_that_can_not_show_images_is_named(case, tmp_path):
    template, words = BAD_TEMPLATES[case]
    folder = published("qwen2_5_vl", tmp_path / "m")
    edit_json(folder / "chat_template.json", chat_template=template)
    with pytest.raises(CheckpointError, match=words + r"[^\n]*$"):
        Processor.from_pretrained(folder).check_template()
    if case.startswith("without"):
        with pytest.raises(CheckpointError, match=words):
            Processor.from_pretrained(folder)([example()])


@pytest.mark.parametrize("text", ["{}", '{"model": {}, "added_tokens": []}'])
def test_a_tokenizer_that_can_not_be_read_is_named(text, tmp_path):
    shutil.copytree(checkpoint("qwen3_vl"), tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"m: its tokenizer can't be read [^\n]*$"):
        Processor.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("end", ["5", ["<|im_end|>"], 10**6, -1, True, 5.0])
def test_an_end_token_that_is_none_is_named(end, tmp_path):
    shutil.copytree(checkpoint("qwen3_vl"), tmp_path / "m")
    edit_json(tmp_path / "m" / "generation_config.json", eos_token_id=end)
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id .* no token"):
        Processor.from_pretrained(tmp_path / "m")


# ---- weights ----


def doubled(source, target) -> None:
    """Save the same checkpoint with its final norm doubled."""
    weights = load_file(source / "model.safetensors")
    norm = "model.language_model.norm.weight"
    save_file(weights | {norm: 2 * weights[norm]}, target, {"format": "pt"})


def test_a_single_file_counts_before_an_index_and_what_is_not_read_is_said(tmp_path, capfd):
    make("qwen3_vl").save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    split_weights(tmp_path / "b")
    doubled(tmp_path / "a", tmp_path / "b" / "model.safetensors")
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "b")
    capfd.readouterr()
    ours = QwenVL.from_pretrained(tmp_path / "b")
    assert torch.equal(ours.decoder.norm.weight, theirs.model.language_model.norm.weight)
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "model.safetensors is read; not model-00001-of-00002.safetensors" in said


def test_saving_leaves_no_weights_of_an_older_save(tmp_path, monkeypatch):
    make("qwen3_vl").save_pretrained(tmp_path / "a")
    model, out = QwenVL.from_pretrained(tmp_path / "a"), tmp_path / "out"
    for scale, shard_bytes in ((1, 100_000), (2, 10**9), (3, 100_000)):
        monkeypatch.setattr("model.checkpoint.SHARD_BYTES", shard_bytes)
        with torch.no_grad():
            model.decoder.norm.weight.fill_(scale)
        model.save_pretrained(out)
        is_whole = (out / "model.safetensors").exists()
        assert is_whole == (shard_bytes == 10**9) != (out / "model.safetensors.index.json").exists()
        for read in (QwenVL, AutoModelForImageTextToText):
            norm = dict(read.from_pretrained(out).named_parameters())
            (weight,) = [
                w
                for n, w in norm.items()
                if n.endswith(("decoder.norm.weight", "model.norm.weight"))
            ]
            assert (weight == scale).all()


HEADS = [
    (family, tied, head)
    for family in FAMILIES
    for tied in (False, True)
    for head in ("absent", "equal", "other", "alone")
]


@pytest.mark.parametrize(("family", "tied", "head"), HEADS)
def test_heads_are_tied_as_transformers_ties_them(family, tied, head, tmp_path):
    """By flag and by what the file has; saved, transformers reads the same model again."""
    reference = make(family)
    reference.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    weights = load_file(file)
    (embedding,) = [name for name in weights if name.endswith("embed_tokens.weight")]
    if head == "absent":
        del weights["lm_head.weight"]
    elif head != "other":
        weights["lm_head.weight"] = weights[embedding].clone()
    if head == "alone":
        del weights[embedding]
    save_file(weights, file, {"format": "pt"})
    edit_json(tmp_path / "a" / "config.json", tie_word_embeddings=tied)

    # transformers would draw what is missing at random.
    lacks = {"absent": "lm_head.weight", "alone": "embed_tokens.weight"}.get(head)
    if lacks and not tied:
        with pytest.raises(CheckpointError, match=f"lacks [a-z_.]*{lacks}"):
            QwenVL.from_pretrained(tmp_path / "a")
        return
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "a").eval()
    ours = QwenVL.from_pretrained(tmp_path / "a")
    batch = inputs()
    keep = batch["attention_mask"].bool()
    want = reference_logits(theirs, batch)[keep]
    assert (ours.logits(**batch)[keep] - want).abs().max() < 1e-4
    ours.save_pretrained(tmp_path / "b")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "b").eval()
    assert torch.equal(reference_logits(again, batch)[keep], want)
    assert (QwenVL.from_pretrained(tmp_path / "b").logits(**batch)[keep] - want).abs().max() < 1e-4


@pytest.mark.parametrize("place", ["top", "text_config", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_flag_counts_where_transformers_reads_it(family, place, tmp_path):
    make(family, tied=True).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    for part, holder in (("top", config), ("text_config", config["text_config"])):
        holder.pop("tie_word_embeddings", None)
        if place in (part, "both"):
            holder["tie_word_embeddings"] = True
    path.write_text(json.dumps(config))
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "a").eval()
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    if not tied:
        with pytest.raises(CheckpointError, match=r"lacks lm_head.weight"):
            QwenVL.from_pretrained(tmp_path / "a")
        return
    batch = inputs()
    keep = batch["attention_mask"].bool()
    ours = QwenVL.from_pretrained(tmp_path / "a").logits(**batch)
    assert (ours - reference_logits(theirs, batch))[keep].abs().max() < 1e-4


def test_what_can_not_be_used_is_refused_by_name(tmp_path):
    def refused(change, family="qwen3_vl") -> str:
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        shutil.copytree(checkpoint(family), tmp_path / "x")
        change(tmp_path / "x")
        with pytest.raises(CheckpointError) as error:
            QwenVL.from_pretrained(tmp_path / "x")
        assert "\n" not in str(error.value)
        return str(error.value)

    def only(name):
        def change(folder):
            (folder / "model.safetensors").rename(folder / name)

        return change

    for name in ("pytorch_model.bin", "model.pt", "model-Q4_K_M.gguf"):
        said = refused(only(name))
        assert name in said and "save_pretrained()" in said

    def without_index(folder):
        split_weights(folder)
        (folder / "model.safetensors.index.json").unlink()

    said = refused(without_index)
    assert (
        "model-00001-of-00002.safetensors" in said and "copy model.safetensors.index.json" in said
    )

    def adapter(folder):
        edit_json(folder / "adapter_config.json", base_model_name_or_path="Qwen/Base")

    for change in (adapter, lambda folder: (adapter(folder), (folder / "config.json").unlink())):
        said = refused(change)
        assert "adapter_config.json" in said and "Qwen/Base" in said and "merge" in said

    def quantised(folder):
        edit_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})

    assert "quantization_config (bitsandbytes)" in refused(quantised)

    def twice(folder):
        weights = load_file(folder / "model.safetensors")
        name = "model.language_model.norm.weight"
        weights["model.norm.weight"] = weights[name].clone()
        save_file(weights, folder / "model.safetensors")

    assert "model.language_model.norm.weight" in refused(twice)
    surplus = refused(
        lambda folder: save_file(
            load_file(folder / "model.safetensors") | {"extra.weight": torch.zeros(2)},
            folder / "model.safetensors",
        )
    )
    assert "unknown tensor extra.weight" in surplus and "which a save would drop" in surplus
    # An adapter in the target would be taken for one of what is saved there.
    model = QwenVL.from_pretrained(checkpoint("qwen3_vl"))
    model.save_pretrained(tmp_path / "out")
    adapter(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"holds an adapter[^\n]*$"):
        model.save_pretrained(tmp_path / "out")


# ---- a vocabulary without a spare row ----


def cut(folder, family: str, tied: bool):
    """The tiny checkpoint with an embedding of as many rows as it has tokens, <mask> not known."""
    shutil.copytree(checkpoint(family), folder)
    (folder / "spatial.safetensors").unlink()
    plain = tiny.tokenizer(family)
    plain.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            weights[name] = weight[: len(plain)].clone()
    if tied:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = len(plain)
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(config))
    return len(plain)


@pytest.mark.parametrize(
    ("family", "tied", "flat"),
    [("qwen2_vl", True, True), ("qwen2_5_vl", False, False), ("qwen3_vl", True, False)],
)
def test_an_embedding_without_a_row_for_mask_grows(family, tied, flat, tmp_path):
    rows = cut(tmp_path / "a", family, tied)
    if flat:
        config = json.loads((tmp_path / "a" / "config.json").read_text())
        config = config.pop("text_config") | config
        (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    p, model = Processor.from_pretrained(tmp_path / "a"), QwenVL.from_pretrained(tmp_path / "a")
    grown = len(model.head_weight)
    assert p.mask_id == rows < grown == len(p.banned) == model.config.text_config.vocab_size
    assert p.banned[rows:].all()
    output = model(p([with_region()], [[[5, 6]]]))
    assert torch.isfinite(output.logprob).all() and output.centres.shape == (1, 3)
    # The other tokens' log-probs are theirs to within what the new rows' mean logits weigh.
    ids = torch.tensor([[5, 6, 7, 8]])
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "a").eval()
    with torch.no_grad():
        want = theirs(input_ids=ids).logits
    got = model.logits(ids)
    assert got.shape[-1] == grown and (got[..., :rows] - want).abs().max() < 1e-4

    model.save_pretrained(tmp_path / "b", p)
    again, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "b", output_loading_info=True
    )
    assert not any(info.values())
    assert again.config.text_config.vocab_size == grown
    assert torch.equal(again.get_input_embeddings().weight, model.decoder.embed_tokens.weight)
    assert torch.equal(again.get_output_embeddings().weight, model.head_weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "b").convert_tokens_to_ids("<mask>") == rows
    model.save_pretrained(tmp_path / "c")  # without the processor, too
    assert Processor.from_pretrained(tmp_path / "c").mask_id == rows
    assert len(QwenVL.from_pretrained(tmp_path / "c").head_weight) == grown


def test_regions_as_text_need_no_row(tmp_path):
    rows = cut(tmp_path / "a", "qwen3_vl", False)
    p = Processor.from_pretrained(tmp_path / "a", regions="text")
    model = QwenVL.from_pretrained(tmp_path / "a", regions="text")
    assert p.mask_id is None and len(p.banned) == len(model.head_weight) == rows
    model(p([with_region()], [[[5, 6]]]))
    for name, processor in (("b", p), ("c", None)):
        model.save_pretrained(tmp_path / name, processor)
        kept = AutoModelForImageTextToText.from_pretrained(tmp_path / name)
        assert len(kept.get_input_embeddings().weight) == rows
        assert len(AutoTokenizer.from_pretrained(tmp_path / name)) == rows


# ---- image settings ----

SETTINGS = {
    "do_rescale": dict(do_rescale=False),
    "do_normalize": dict(do_normalize=False),
    "neither": dict(do_rescale=False, do_normalize=False),
    "do_resize": dict(do_resize=False),
    "do_convert_rgb": dict(do_convert_rgb=False),
    "rescale_factor": dict(rescale_factor=1 / 127.5, image_mean=[1, 1, 1], image_std=[1, 1, 1]),
    "one mean for all": dict(image_mean=0.4, image_std=0.2),
    "resample": dict(resample=2),
    "size": dict(size={"shortest_edge": 64 * 64, "longest_edge": 64 * 96}),
    "old form": dict(size=None, min_pixels=64 * 64, max_pixels=64 * 96),
    "both forms": dict(
        size={"shortest_edge": 1, "longest_edge": 2}, min_pixels=64 * 64, max_pixels=64 * 96
    ),
    "oldest form": dict(
        size={"min_pixels": 64 * 64, "max_pixels": 64 * 96},
        min_pixels=64 * 64,
        max_pixels=64 * 96,
    ),
    "upper bound below the lower": dict(size={"shortest_edge": 64 * 96, "longest_edge": 64 * 64}),
    "null": dict(min_pixels=None, max_pixels=None, do_rescale=None),
}


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("case", list(SETTINGS))
def test_image_settings_are_taken_as_transformers_takes_them(case, file, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(checkpoint("qwen3_vl"), folder)
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text()) | SETTINGS[case]
    if settings["size"] is None:
        del settings["size"]
    if file == "processor_config.json":
        # What it nests counts before the older file.
        (folder / file).write_text(json.dumps({"image_processor": settings}))
    else:
        path.write_text(json.dumps(settings))
    images = [PICTURE, PICTURE.resize((96, 80)), PICTURE.resize((32, 112))]
    want = transformers_processor(folder).image_processor(images, return_tensors="pt")
    p = Processor.from_pretrained(folder)
    got = p([example(images=[image]) for image in images])
    assert torch.equal(got.image_grid_thw, want["image_grid_thw"])
    assert torch.equal(got.pixel_values, want["pixel_values"])
    # With a bound of its own, the saved settings say so in every form.
    smaller = Processor.from_pretrained(folder, max_pixels=64 * 64)
    smaller.save(tmp_path / "out")
    theirs = transformers_processor(tmp_path / "out").image_processor(images, return_tensors="pt")
    ours = smaller([example(images=[image]) for image in images])
    assert torch.equal(ours.pixel_values, theirs["pixel_values"])


def test_unresized_images_have_to_fit_the_patches(tmp_path):
    shutil.copytree(checkpoint("qwen3_vl"), tmp_path / "m")
    edit_json(tmp_path / "m" / "preprocessor_config.json", do_resize=False)
    with pytest.raises(ValueError, match=r"row 7: image 0 .*65 x 48 pixels.*multiples of 16$"):
        Processor.from_pretrained(tmp_path / "m")([example(images=[PICTURE.resize((65, 48))])])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(size=500), "size.longest_edge"),
        (dict(size="large"), "size"),
        (dict(size={"min_pixels": 64, "max_pixels": 640}), "size.shortest_edge"),
        (dict(image_mean=None), "image_mean"),
        (dict(image_mean=[0.5], image_std=[0.5]), "mean must have 3 elements"),
        (dict(resample="bicubic"), "resample 'bicubic' is no filter"),
        (dict(resample=9), "resampling filter"),
        (dict(max_pixels="6144"), "str"),
        (dict(rescale_factor="1/255"), "multiply"),
        (dict(size={"shortest_edge": 0, "longest_edge": 6144}), "shortest_edge"),
        (dict(patch_size=None), "NoneType"),
    ],
)
def test_image_settings_that_transformers_can_not_use_are_named(changes, named, tmp_path):
    shutil.copytree(checkpoint("qwen3_vl"), tmp_path / "m")
    path = tmp_path / "m" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for cls in (Processor, QwenVL):
        with pytest.raises(CheckpointError, match=rf"preprocessor_config.json: .*{named}[^\n]*$"):
            cls.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "value"), [("patch_size", 14), ("merge_size", 4), ("temporal_patch_size", 1)]
)
def test_patches_that_the_tower_does_not_have_are_refused_with_both_numbers(name, value, tmp_path):
    shutil.copytree(checkpoint("qwen3_vl"), tmp_path / "m")
    settings = json.loads((tmp_path / "m" / "preprocessor_config.json").read_text())
    edit_json(tmp_path / "m" / "preprocessor_config.json", **{name: value})
    words = f"preprocessor_config.json: {name} {value}, .*tower has {settings[name]};[^\n]*$"
    with pytest.raises(CheckpointError, match=words):
        QwenVL.from_pretrained(tmp_path / "m")


# ---- permissions ----


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_the_umask_decides_who_may_read_what_is_saved(umask, tmp_path):
    model = QwenVL.from_pretrained(checkpoint("qwen3_vl"))
    before = os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "out", Processor.from_pretrained(checkpoint("qwen3_vl")))
    finally:
        os.umask(before)
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else for a while")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "."])
def test_a_permission_is_named_as_one(name, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(checkpoint("qwen3_vl"), folder)
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == 0 and path != path.parent and "pytest" in str(path):
            path.chmod(0o755)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    (folder / name).chmod(0o600)
    os.seteuid(65534)
    try:
        for cls in (QwenVL, Processor):
            with pytest.raises(CheckpointError, match=r"no permission to read it[^\n]*$"):
                cls.from_pretrained(folder)
    finally:
        os.seteuid(0)


# ---- a run's directory ----


def step(run, number: int, torn: bool = False) -> None:
    """A whole step folder of a run, or one with a file cut short."""
    folder = run / f"step-{number:06d}"
    shutil.copytree(checkpoint("qwen3_vl"), folder)
    (folder / "trainer").mkdir()
    sizes = {p.name: p.stat().st_size for p in folder.iterdir() if p.is_file()}
    state = {"step": number, "files": sizes}
    (folder / "trainer" / "state.json").write_text(json.dumps(state))
    if torn:
        (folder / "model.safetensors").write_bytes(b"x")


def test_a_folder_around_checkpoints_says_which_was_meant(tmp_path):
    for place in ("trainer/checkpoint-500", "hub/snapshots/0a1b"):
        shutil.copytree(checkpoint("qwen3_vl"), tmp_path / place)
        folder = tmp_path / place.partition("/")[0]
        with pytest.raises(CheckpointError, match=f"did you mean {tmp_path / place}[?]$"):
            QwenVL.from_pretrained(folder)


def test_a_runs_directory_means_its_newest_whole_step(tmp_path, capfd):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"script": "train_sft", "model": "m"}')
    with pytest.raises(CheckpointError, match="config.json"):
        QwenVL.from_pretrained(run)  # no step yet
    step(run, 1, torn=True)
    with pytest.raises(CheckpointError, match="step-000001 lacks model.safetensors"):
        QwenVL.from_pretrained(run)
    step(run, 2)
    step(run, 3)
    step(run, 4, torn=True)
    (run / "step-000005.partial").mkdir()
    (run / "step-000006").mkdir()
    capfd.readouterr()
    assert QwenVL.from_pretrained(run).origin.directory == run / "step-000003"
    assert Processor.from_pretrained(run).files == run / "step-000003"
    assert capfd.readouterr().err.count("newest whole checkpoint is step-000003\n") == 2
    said = []
    assert checkpoint_of(str(run), said.append) == str(run / "step-000003") and len(said) == 1
    assert checkpoint_of(str(run / "step-000002"), said.append) == str(run / "step-000002")
    assert len(said) == 1


# ---- what is on record of the extra parts ----


def metadata(folder) -> dict:
    with safe_open(folder / "spatial.safetensors", "pt") as file:
        return file.metadata()


def recorded(folder, **changes):
    """The tiny checkpoint with changed metadata of spatial.safetensors."""
    shutil.copytree(checkpoint("qwen3_vl"), folder)
    path = folder / "spatial.safetensors"
    save_file(load_file(path), path, metadata(folder) | changes)
    return folder


def test_the_record_comes_back_and_a_mismatch_names_both_ways(tmp_path):
    model = QwenVL.from_pretrained(recorded(tmp_path / "a", regions="text", trained="points"))
    assert model.record.regions == "text" and model.record.trained == {"points"}
    model.save_pretrained(tmp_path / "b")
    assert metadata(tmp_path / "b") == {"points": "metric", "regions": "text", "trained": "points"}
    words = r"trained with --regions text, and --regions token is asked for[^\n]*$"
    with pytest.raises(CheckpointError, match=words):
        Processor.from_pretrained(tmp_path / "b")
    assert Processor.from_pretrained(tmp_path / "b", regions="text").record == model.record
    # One that has never been trained may be read either way.
    for regions in ("token", "text"):
        Processor.from_pretrained(checkpoint("qwen3_vl"), regions=regions)


def test_untrained_parts_that_would_be_used_are_named(tmp_path):
    with_depth = example(depths=[np.ones((48, 64), np.float32)])

    def unsaid(trained: str, examples, **options) -> list[str]:
        folder = tmp_path / f"trained {trained}"
        if not folder.exists():
            recorded(folder, trained=trained)
        return Processor.from_pretrained(folder).untrained_parts(examples, **options)

    (said,) = unsaid("", [with_region()])
    assert "region token never learnt" in said
    assert len(unsaid("", [with_region(), with_depth], head=True)) == 3
    assert unsaid("", [example()], head=True) == []
    assert unsaid("region,head3d,points", [with_region(), with_depth], head=True) == []
    (said,) = unsaid("region", [with_region()], head=True)
    assert "3D head never learnt" in said
    (said,) = unsaid("region,head3d", [with_depth])
    assert "point map never learnt" in said
    assert unsaid("", [with_region()], learning=("region.", "points.")) == []
    text = Processor.from_pretrained(checkpoint("qwen3_vl"), regions="text")
    assert text.untrained_parts([with_region()], head=True) == []
    # Published checkpoints have none of it; of older files nothing is known.
    (said,) = Processor.from_pretrained(published("qwen3_vl", tmp_path / "hub")).untrained_parts(
        [with_region()]
    )
    assert "region token" in said
    shutil.copytree(checkpoint("qwen3_vl"), tmp_path / "old")
    path = tmp_path / "old" / "spatial.safetensors"
    save_file(load_file(path), path, {"points": "metric"})
    assert Processor.from_pretrained(tmp_path / "old").untrained_parts([with_region()]) == []


def test_equal_tensors_make_equal_files(tmp_path):
    """safetensors writes metadata in an order that differs from run to run."""
    tensors = {"b": torch.arange(5.0), "a.é": torch.ones(2, 3, dtype=torch.bfloat16)}
    metadata = {f"key {i}": f"wert {i} ü" for i in range(9)}
    contents = set()
    for i in range(4):
        save_tensors(tensors, tmp_path / str(i), dict(reversed(metadata.items())))
        contents.add((tmp_path / str(i)).read_bytes())
    assert len(contents) == 1
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert file.metadata() == metadata and torch.equal(file.get_tensor("b"), tensors["b"])
