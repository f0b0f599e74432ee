"""The processor against independent oracles: transformers' image processor and rope index, closed
forms of geometry, and, for packing, the plain concatenation of what each example gives alone."""

import json
import os
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoint import FAMILIES, checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from kernels.packed_attention import upload
from mentions import object_of
from model import tiny
from model.families import FAMILIES as TRAITS
from model.files import CheckpointError
from model.head3d import point_grid
from model.images import DeviceImages, LRUCache, in_merge_order
from model.processor import Processor
from model.region import region_weights
from srreal import Example, prompt, target

RNG = np.random.default_rng(0)


def processor(family="qwen3_vl", **settings) -> Processor:
    return Processor.from_pretrained(checkpoint(family), **settings)


def picture(width, height, seed=0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def example(images=(), question="What is it?", **rest) -> Example:
    return Example(
        "row 7", rest.pop("path", "lor"), list(images), question, rest.pop("answer", "A"), **rest
    )


def edited(folder, name, change, family="qwen3_vl"):
    """A copy of the tiny checkpoint, less its weights, with one of its JSON files changed."""
    shutil.copytree(checkpoint(family), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(change(values)))
    return folder


# ---- images ----

PREPROCESSORS = {  # as published: patch, mean and std, size in the old or the new form
    "qwen2_vl": dict(
        patch_size=14,
        min_pixels=3136,
        max_pixels=12845056,
        image_mean=TRAITS["qwen2_vl"].pixel_mean,
        image_std=TRAITS["qwen2_vl"].pixel_std,
    ),
    "qwen2_5_vl": dict(
        patch_size=14,
        size={"shortest_edge": 3136, "longest_edge": 60000},
        image_mean=TRAITS["qwen2_vl"].pixel_mean,
        image_std=TRAITS["qwen2_vl"].pixel_std,
    ),
    "qwen3_vl": dict(
        patch_size=16,
        size={"longest_edge": 30000, "shortest_edge": 65536 // 8},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ),
    "qwen3_5": dict(
        patch_size=16,
        size={"longest_edge": 30000, "shortest_edge": 65536 // 8},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_transformers(family, tmp_path):
    folder = edited(
        tmp_path / "m",
        "preprocessor_config.json",
        lambda old: {"merge_size": 2, "temporal_patch_size": 2} | PREPROCESSORS[family],
        family,
    )
    ours, theirs = (
        Processor.from_pretrained(folder),
        Qwen2VLImageProcessorPil.from_pretrained(folder),
    )
    grey = picture(97, 61).convert("L")
    clear = picture(64, 90).convert("RGBA")
    clear.putalpha(grey.resize(clear.size))
    images = [
        picture(256, 192),
        picture(331, 97),
        picture(20, 300),
        picture(5, 7),
        grey,
        clear,
        picture(90, 80).convert("P"),
        picture(40, 30).convert("1"),
        picture(50, 40).convert("CMYK"),
    ]
    want = theirs(images, return_tensors="pt")
    got = ours([example([image]) for image in images])
    assert torch.equal(got.image_grid_thw, want["image_grid_thw"])
    assert torch.equal(got.pixel_values, want["pixel_values"])
    bound = 20000
    small, theirs.size = (
        Processor.from_pretrained(folder, max_pixels=bound),
        {"shortest_edge": 3136, "longest_edge": bound},
    )
    assert torch.equal(
        small([example(images[:1])]).pixel_values,
        theirs(images[0], return_tensors="pt")["pixel_values"],
    )


def test_pixels_travel_as_bytes_and_are_normalised_in_any_dtype():
    """Levels are looked up in fp32's own values: a cast of the table is a cast of every pixel."""
    batch = processor()([example([picture(64, 48, 1), picture(48, 64, 2)])])
    assert batch.patches.dtype == torch.uint8 and batch.patches.shape == (96, 3, 64)
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(batch.pixels(dtype), batch.pixel_values.to(dtype))
    levels = batch.levels[:, None, None, :].expand(-1, 96, 64, -1)
    plain = levels.gather(3, batch.patches.transpose(0, 1)[..., None].long())[..., 0].transpose(
        0, 1
    )
    for frame in batch.pixel_values.view(96, 3, 2, 64).unbind(2):
        assert torch.equal(frame, plain)


def test_a_steps_images_are_uploaded_once(monkeypatch):
    p, a, b = processor(), picture(64, 48, 1), picture(48, 64, 2)
    asked = [example([a]), example([b]), example([a, b])]
    sent = []

    def note(values, device):
        sent.append(values)
        return upload(values, device)

    monkeypatch.setattr("model.images.upload", note)
    monkeypatch.setattr("model.batch.upload", note)
    p.prefetch(asked)  # as a training step does: from here on an image is decoded once
    images = DeviceImages("cpu")
    for examples in (asked, asked[1:], asked[:1]):
        batch = p(examples, [[[5, 6]]] * len(examples))
        moved = batch.to("cpu", images)
        assert torch.equal(moved.patches, batch.patches)
        assert torch.equal(moved.pixel_values, batch.pixel_values)
    arrays = {array.ctypes.data for array in p(asked).arrays}
    assert len(arrays) == 2 and sum(v.data_ptr() in arrays for v in sent) == 2

    p.prefetch([])
    before = p([example([a])]).to("cpu", images).patches
    a.putpixel((0, 0), tuple(255 - v for v in a.getpixel((0, 0))))  # the same object, another image
    after = p([example([a])])
    assert torch.equal(after.to("cpu", images).patches, after.patches)
    assert not torch.equal(after.patches, before)


def test_grids_stay_on_the_host():
    batch = processor()([example([picture(64, 48)])])
    moved = batch.to("meta")
    # asking a GPU for them would make the host wait
    assert moved.image_grid_thw.device.type == "cpu"
    assert (
        moved.patches.device.type
        == moved.levels.device.type
        == moved.image_at.device.type
        == "meta"
    )


def test_images_may_be_paths_16_bit_or_anything_that_converts(tmp_path):
    image, p = picture(64, 48), processor()
    image.save(tmp_path / "a.png")

    class Lazy:
        size = image.size

        def convert(self, mode):
            return image.convert(mode)

    want = p([example([image])]).pixel_values
    for other in (str(tmp_path / "a.png"), tmp_path / "a.png", Lazy()):
        assert torch.equal(p([example([other])]).pixel_values, want)
    grey = np.asarray(image.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) << 8)
    want = p([example([Image.fromarray(grey)])]).pixel_values
    for wide in (deep, deep.convert("I"), Image.fromarray(grey.astype(np.int32))):
        assert torch.equal(p([example([wide])]).pixel_values, want)


def test_a_bad_image_names_the_row_and_the_file(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG nonsense")
    picture(64, 48).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    for name in ("bad.png", "cut.png", "missing.png"):
        with pytest.raises(ValueError, match=f"row 7: image 0 .*{name}"):
            processor()([example([tmp_path / name])])


def test_each_distinct_image_is_listed_once_and_the_cache_is_bounded(tmp_path):
    p, a, b = processor(), picture(64, 48, 1), picture(48, 64, 2)
    batch = p([example([a, b]), example([b]), example([a])])
    assert batch.image_grid_thw.tolist() == [[1, 6, 8], [1, 8, 6]] and len(batch.pixel_values) == 96
    assert batch.image_rows.tolist() == [*range(24), *range(12, 24), *range(12)]
    p.images.views.max_bytes = 1
    paths = [tmp_path / f"{seed}.png" for seed in range(5)]
    for seed, path in enumerate(paths):
        picture(64, 48, seed).save(path)
    assert len(p([example([path]) for path in paths]).image_grid_thw) == 5
    assert len(p.images.views.items) == 1


def test_what_has_changed_is_read_again(tmp_path):
    p, path, image, depth = (
        processor(),
        tmp_path / "a.png",
        picture(64, 48, 1),
        np.ones((48, 64), np.float32),
    )
    image.save(path)
    old = p([example([str(path)])]).pixel_values
    assert p([example([path])]).pixel_values.equal(old) and len(p.images.views.items) == 1
    picture(64, 48, 2).save(path)
    os.utime(path, ns=(0, 1))
    assert not p([example([path])]).pixel_values.equal(old)
    e = example([image], depths=[depth], intrinsics=[CAMERA])
    before = p([e, e])
    assert len(before.image_grid_thw) == 1  # within a call an object is one image
    image.putpixel((0, 0), tuple(255 - v for v in image.getpixel((0, 0))))
    depth += 1
    after = p([e])
    assert not after.pixel_values.equal(before.pixel_values) and not after.points.equal(
        before.points
    )


def test_threads_share_the_memory_and_its_count_stays_exact():
    cache = LRUCache(50, lambda item: 1)

    def work():
        for k in range(20_000):
            assert cache.get(k * 7919 % 200, lambda: "x") == "x"

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.bytes == len(cache.items) == 50


# ---- positions ----


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_transformers(family):
    p, model = (
        processor(family),
        AutoModelForImageTextToText.from_pretrained(checkpoint(family)).model,
    )
    a, b, c = picture(64, 48, 1), picture(40, 90, 2), picture(256, 192, 3)
    for e in (
        example(),
        example([a]),
        example([a, b, c]),
        example([b, c], "First <image> then <image> end."),
    ):
        batch = p([e])
        ids = batch.input_ids[None]
        kinds = (ids == p.image_token_id).int()
        want, delta = model.get_rope_index(
            ids, mm_token_type_ids=kinds, image_grid_thw=batch.image_grid_thw
        )
        assert torch.equal(batch.position_ids, want[:, 0])
        assert (
            batch.next_position.item()
            == ids.shape[1] + delta.item()
            == batch.position_ids.max() + 1
        )
        assert batch.input_ids.tolist() == p.prompt_ids(e) and batch.last.tolist() == [
            ids.shape[1] - 1
        ]
        assert (
            batch.segments == [(0, ids.shape[1], 0, 0)]
            or batch.segments[0][2] == batch.segments[0][3]
        )
        assert batch.targets.shape == batch.predict_from.shape == (
            0,
        ) and batch.cu_targets.tolist() == [0]


# ---- text ----


def test_the_prompt_is_the_checkpoints_template_with_images_first_or_at_their_markers():
    p, a, b = processor("qwen2_5_vl"), picture(32, 32, 1), picture(32, 32, 2)
    image = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    for question, body in (
        ("Q?", f"{image}{image}Q?"),
        ("x <image>y\n<image> z", f"x {image}y\n{image} z"),
    ):
        e = example([a, b], question, path="direct")
        assert p.tokenizer.decode(p.prompt_ids(e)) == head + body + tail
    e = example([a], "Q?")
    assert p.tokenizer.decode(p.prompt_ids(e)) == head + image + prompt(e) + tail
    with pytest.raises(ValueError, match="row 7: 1 <image>"):
        p([example([a, b], "<image> and the other?")])


def test_targets_end_with_the_end_token_and_decode_to_the_text():
    for family in FAMILIES:
        p, e = processor(family), example(rationale="It looks so.")
        ids = p.target_ids(e)
        assert (
            ids[-1] == p.end_id == p.tokenizer.convert_tokens_to_ids("<|im_end|>")
            and ids[-1] not in ids[:-1]
        )
        assert p.decode(ids) == p.decode(ids[:-1]) == target(e) and "<think>" in target(e)
        assert (
            p.tokenizer.convert_tokens_to_ids("<think>") in p.tokenizer.added_tokens_decoder
        ) == (family in ("qwen3_vl", "qwen3_5"))


@pytest.mark.parametrize(
    "bad", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>", "<|endoftext|>", "<|video_pad|>"]
)
def test_control_tokens_in_a_row_are_refused(bad):
    with pytest.raises(ValueError, match="row 7: the question holds the control token"):
        processor()([example(question=f"What is {bad} this?")])
    with pytest.raises(ValueError, match="row 7: the target holds the control token"):
        processor().target_ids(example(path="direct", answer=f"A{bad}"))
    # these may
    processor()([example(question="<|box_start|>(1,2),(3,4)<|box_end|> <think> <tool>")])


def test_a_thinking_template_is_cut_before_its_think(tmp_path):
    template = (checkpoint("qwen3_vl") / "chat_template.jinja").read_text()
    for k, opening in enumerate(("<think>\n", "<think>")):
        folder = edited(tmp_path / str(k), "x.json", lambda old: {})
        (folder / "chat_template.jinja").write_text(
            template.replace("assistant\n", "assistant\n" + opening)
        )
        e = example([picture(32, 32)])
        thinking = Processor.from_pretrained(folder)
        rendered = thinking.tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
        )
        assert rendered.endswith(opening) and thinking.prompt_ids(e) == processor().prompt_ids(e)


def test_mask_takes_the_first_spare_row_or_a_new_one(tmp_path):
    plain = tiny.tokenizer("qwen2_vl")
    folder = edited(tmp_path / "m", "x.json", lambda old: {}, "qwen2_vl")
    plain.save_pretrained(folder)
    p = Processor.from_pretrained(folder)
    assert p.mask_id == len(plain) == len(p.tokenizer) - 1
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = len(plain)
    (folder / "config.json").write_text(json.dumps(config))
    p = Processor.from_pretrained(folder)
    assert p.mask_id == len(plain) < len(p.banned)
    config["text_config"]["vocab_size"] -= 1  # of another checkpoint's tokenizer
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{len(plain)} tokens, but {len(plain) - 1} embeddings"):
        Processor.from_pretrained(folder)


def test_banned_and_end_ids(tmp_path):
    for family in FAMILIES:
        p = processor(family)
        vocab = p.tokenizer.get_vocab()
        rows = p.config.text_config.vocab_size
        never = {
            vocab[f"<|{name}|>"]
            for name in ("image_pad", "video_pad", "vision_start", "vision_end", "vision_pad")
        }
        want = never | {p.mask_id} | (set(range(rows)) - set(vocab.values()))
        assert set(p.banned.nonzero().flatten().tolist()) == want and len(p.banned) == rows
        assert p.end_ids == [vocab["<|im_end|>"], vocab["<|endoftext|>"]]
    vocab = processor("qwen3_vl").tokenizer.get_vocab()
    one = edited(tmp_path / "one", "generation_config.json", lambda old: {"eos_token_id": 5})
    none = edited(tmp_path / "none", "generation_config.json", lambda old: {})
    assert (
        Processor.from_pretrained(one).end_ids == [5] and Processor.from_pretrained(one).end_id == 5
    )
    assert Processor.from_pretrained(none).end_ids == [vocab["<|im_end|>"]]
    zero = edited(tmp_path / "zero", "generation_config.json", lambda old: {"eos_token_id": 0})
    assert Processor.from_pretrained(zero).end_ids == [0]


def test_a_missing_file_is_named_in_one_line(tmp_path):
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
    for name in (*names, "chat_template.jinja"):
        folder = edited(tmp_path / name, "x.json", lambda old: {})
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=rf"no {name}[^\n]*$"):
            Processor.from_pretrained(folder)
    folder = edited(tmp_path / "cut", "x.json", lambda old: {})
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json: not the JSON[^\n]*$"):
        Processor.from_pretrained(folder)


def test_the_published_layout_of_vocab_merges_and_chat_template_json(tmp_path):
    """Qwen2Tokenizer from vocab.json and merges.txt, with `<mask>` after save and load, other ids
    kept."""
    folder = edited(tmp_path / "m", "x.json", lambda old: {}, "qwen2_vl")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        ["the chair and the table"] * 9,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet),
    )
    bpe.model.save(str(folder))
    start, vocab = bpe.get_vocab_size(), json.loads((folder / "config.json").read_text())
    added = {str(start + i): {"content": t, "special": True} for i, t in enumerate(tiny.SPECIAL)}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "eos_token": "<|im_end|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.json").write_text(
        json.dumps({"chat_template": tiny.chat_template(None)})
    )
    ids = {f"{k}_token_id": start + tiny.SPECIAL.index(f"<|{k}_pad|>") for k in ("image", "video")}
    (folder / "config.json").write_text(json.dumps(vocab | ids))
    p, e = (
        Processor.from_pretrained(folder),
        example(
            [picture(64, 48)],
            "The <think> (red bbox <mask>)?",
            rationale="x",
            regions=[(0, (3, 4, 20, 30))],
        ),
    )
    assert p.mask_id == start + len(tiny.SPECIAL) == len(p.tokenizer) - 1
    assert p.decode(p.target_ids(e)) == target(e)
    p.save(tmp_path / "saved")
    again = Processor.from_pretrained(tmp_path / "saved")
    assert (
        again.mask_id == p.mask_id
        and again.prompt_ids(e) == p.prompt_ids(e)
        and again.target_ids(e) == p.target_ids(e)
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == p.tokenizer.get_vocab()


def test_save_keeps_every_file_but_weights_and_writes_max_pixels(tmp_path):
    source = edited(tmp_path / "m", "README.md", lambda old: "hello")
    (source / "model.safetensors").write_bytes(b"x")
    p = Processor.from_pretrained(source, max_pixels=5000)
    p.save(tmp_path / "out")
    names = {path.name for path in source.iterdir()} - {"model.safetensors"}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert Processor.from_pretrained(tmp_path / "out").max_pixels == 5000
    image = picture(256, 192)
    again = Processor.from_pretrained(tmp_path / "out")([example([image])])
    assert torch.equal(again.pixel_values, p([example([image])]).pixel_values)


def test_max_pixels_are_saved_in_every_form_and_nothing_else_changes(tmp_path):
    published = {"min_pixels": 3136, "max_pixels": 12845056, "processor_class": "Qwen2VLProcessor"}

    def older(old):
        return {k: v for k, v in old.items() if k != "size"} | published

    def newer(old):
        return {"processor_class": "Qwen3VLProcessor", "image_processor": {"size": None, **images}}

    images = json.loads((checkpoint("qwen3_vl") / "preprocessor_config.json").read_text())
    for name, change in (("preprocessor_config.json", older), ("processor_config.json", newer)):
        source = edited(tmp_path / "in" / name, name, change)
        Processor.from_pretrained(source, max_pixels=3000).save(tmp_path / name)
        assert Processor.from_pretrained(tmp_path / name).max_pixels == 3000
        theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / name)
        assert dict(theirs.size)["longest_edge"] == 3000
        old, new = (json.loads((folder / name).read_text()) for folder in (source, tmp_path / name))
        assert old["processor_class"] == new["processor_class"] and new.keys() - old.keys() <= {
            "size"
        }


# ---- regions ----


def dense(batch, region, grid):
    """The region's weights as (rows, columns), undoing the merge blocks by the image processor's
    own rule."""
    rows, columns = grid
    order = in_merge_order(np.arange(rows * columns).reshape(rows, columns), 2)
    flat, mine = np.zeros(rows * columns), batch.region_id == region
    flat[order[batch.region_patch[mine].numpy()]] = batch.region_weight[mine].numpy()
    return flat.reshape(rows, columns)


def test_patch_order_is_the_image_processors():
    """An image whose patches each hold their own number."""
    rows, columns = 6, 8
    levels = np.arange(rows * columns, dtype=np.uint8).reshape(rows, columns)
    image = Image.fromarray(np.kron(levels, np.ones((8, 8), np.uint8)))
    p = processor(max_pixels=64 * 48)
    first_pixel = ((p([example([image])]).pixel_values[:, 0] * 0.5 + 0.5) * 255).round().int()
    assert first_pixel.tolist() == in_merge_order(levels, 2).tolist()
    assert first_pixel[:6].tolist() == [0, 1, 8, 9, 2, 3]


def test_region_weights_closed_form():
    """64 x 48 pixels on 6 x 8 patches of 8; then the same on an image twice as large."""
    image, boxes = (
        picture(64, 48),
        [(8, 8, 24, 16), (4, 0, 20, 4), (63, 47, 64, 48), (-5, -5, 8, 8)],
    )
    want = [
        {(1, 1): 0.5, (1, 2): 0.5},
        {(0, 0): 0.25, (0, 1): 0.5, (0, 2): 0.25},
        {(5, 7): 1.0},
        {(0, 0): 1.0},
    ]
    question = "a <mask> b <mask> c <mask> d <mask>"
    for scale, p in ((1, processor()), (2, processor(max_pixels=64 * 48))):
        regions = [(0, tuple(v * scale for v in box)) for box in boxes]
        batch = p([example([image.resize((64 * scale, 48 * scale))], question, regions=regions)])
        assert batch.image_grid_thw.tolist() == [[1, 6, 8]]
        assert (batch.input_ids[batch.region_token] == p.mask_id).all() and len(
            batch.region_token
        ) == 4
        for k, cells in enumerate(want):
            truth = np.zeros((6, 8))
            truth[tuple(zip(*cells, strict=True))] = list(cells.values())
            np.testing.assert_allclose(dense(batch, k, (6, 8)), truth, atol=1e-6)


def test_a_tiny_box_and_a_box_at_the_border_still_get_their_share():
    for box, cell in [
        ((20, 20, 20, 20), (2, 2)),
        ((20, 20, 20.001, 20.001), (2, 2)),
        ((64, 48, 64, 48), (5, 7)),
        ((0, 0, 0, 0), (0, 0)),
        ((16, 16, 16.0001, 16.0001), (2, 2)),
        ((60, 40, 900, 900), (5, 7)),
    ]:
        weights = region_weights(box, (64, 48), (6, 8))
        assert weights.sum() == pytest.approx(1) and weights[cell] == pytest.approx(1)
    for box in [(70, 0, 80, 8), (0, -9, 8, -1), (float("nan"), 0, 8, 8), (9, 9, 8, 10)]:
        with pytest.raises(ValueError, match="region"):
            region_weights(box, (64, 48), (6, 8))


def test_masks_are_averaged_exactly_also_where_sizes_do_not_divide():
    mask = np.zeros((48, 64), bool)
    mask[5:30, 10:41] = True
    np.testing.assert_allclose(
        region_weights(mask, (64, 48), (6, 8)), region_weights((10, 5, 41, 30), (64, 48), (6, 8))
    )
    mask = np.random.default_rng(0).random((35, 53)) < 0.3
    fine = np.kron(mask, np.ones((6, 8)))  # now 6 x 8 divides it: a plain mean over blocks is exact
    want = fine.reshape(6, 35, 8, 53).mean((1, 3))
    np.testing.assert_allclose(
        region_weights(mask, (53, 35), (6, 8)), want / want.sum(), atol=1e-12
    )
    with pytest.raises(ValueError, match="mask"):
        region_weights(np.zeros((35, 53), bool), (53, 35), (6, 8))


def test_the_mask_count_must_equal_the_regions():
    image = picture(64, 48)
    for question, regions in [
        ("<mask>", []),
        ("none", [(0, (1, 1, 9, 9))]),
        ("<mask> <mask>", [(0, (1, 1, 9, 9))]),
    ]:
        with pytest.raises(ValueError, match="row 7: .* <mask> in the question"):
            processor()([example([image], question, regions=regions)])
    with pytest.raises(ValueError, match="row 7: a region lies on an image"):
        processor()([example([image], "<mask>", regions=[(1, (1, 1, 9, 9))])])
    for bad in ((70, 0, 80, 8), np.zeros((48, 64), bool), [[True], [True, False]], (1, 2, 3), None):
        for regions in ("token", "text"):
            with pytest.raises(ValueError, match="row 7: region 0: "):
                processor(regions=regions)([example([image], "<mask>", regions=[(0, bad)])])
    with pytest.raises(ValueError, match="row 7: .* in the target"):
        processor().target_ids(example(path="direct", answer="the <mask>"))


def test_a_mask_may_be_a_tensor_or_nested_lists():
    mask = np.zeros((48, 64), bool)
    mask[5:30, 10:41] = True
    for p in (processor(), processor(regions="text")):
        want, *others = [
            p([example([picture(64, 48)], "a <mask>", regions=[(0, form)])])
            for form in (mask, torch.from_numpy(mask), mask.tolist(), mask.astype(np.uint8) * 255)
        ]
        for got in others:
            assert torch.equal(got.region_weight, want.region_weight)
            assert torch.equal(got.input_ids, want.input_ids)


@pytest.mark.parametrize(
    "family, text",
    [
        ("qwen2_vl", "red <|box_start|>(125,167),(375,500)<|box_end|>?"),
        ("qwen2_5_vl", 'red {"bbox_2d": [16, 16, 48, 48]}?'),  # 256 x 192 is resized to 128 x 96
        ("qwen3_vl", 'red {"bbox_2d": [125, 167, 375, 500]}?'),
    ],
)
def test_regions_as_text_in_the_familys_own_convention(family, text):
    p, mask = processor(family, regions="text"), np.zeros((192, 256), bool)
    mask[32:96, 32:96] = True
    for region in ((32, 32, 96, 96), mask):
        e = example(
            [picture(256, 192)],
            "red <mask>?",
            regions=[(0, region)],
            path="direct",
            objects={"red": (1, 2, 3)},
        )
        assert text in p.tokenizer.decode(p.prompt_ids(e))
        batch = p([e])
        assert len(batch.region_token) == len(batch.region_id) == len(batch.centres) == 0
        assert p.mask_id not in batch.input_ids
    e.regions = [(0, (-9, 64, 128, 500))]  # cut off at the image, as a region token's weights are
    p1 = processor("qwen3_vl", regions="text")
    assert '{"bbox_2d": [0, 333, 500, 1000]}' in p1.tokenizer.decode(p1.prompt_ids(e))
    two = replace(e, images=[picture(9, 9), picture(256, 192)], regions=[(1, (32, 32, 96, 96))])
    assert text.replace("red ", "red image 1 ") in p.tokenizer.decode(p.prompt_ids(two))


def test_truth_belongs_to_the_mention_right_before_the_mask():
    objects = {
        "red bbox": (1, 2, 3),
        "dark red bbox": (4, 5, 6),
        "Blue Point": {0: (7, 8, 9), 1: (1, 1, 1)},
    }
    assert object_of("the chair (dark red bbox ", objects) == "dark red bbox"
    assert object_of("the chair (RED bbox) ", objects) == "red bbox"
    assert (
        object_of("blue point", objects) == "Blue Point"
        and object_of("bored bbox!", objects) is None
    )
    assert object_of("red bbox or", objects) is None and object_of("", objects) is None
    words = {"chair": 0, "椅子": 1, "стол": 2}
    assert object_of("红色椅子 ", words) == object_of("看1椅子（", words) == "椅子"
    assert [object_of(t, words) for t in ("arm-chair", "my_chair", "armchair", "подстол")] == [
        None
    ] * 4
    assert object_of("a/chair", words) == object_of("(chair", words) == "chair"
    p, images, box = processor(), [picture(64, 48, 1), picture(64, 48, 2)], (3, 3, 9, 9)
    batch = p(
        [
            example(
                images[:1],
                "A (dark red bbox <mask>), red bbox <mask> or a thing <mask>?",
                objects=objects,
                regions=[(0, box)] * 3,
                sizes={"red bbox": (0.5, 0.6, 0.7)},
            )
        ]
    )
    nan = [np.nan] * 3
    np.testing.assert_equal(batch.centres.tolist(), [[4, 5, 6], [1, 2, 3], nan])
    np.testing.assert_allclose(batch.sizes, [nan, [0.5, 0.6, 0.7], nan])
    batch = p(
        [
            example(
                images,
                "blue point <mask> blue point <mask> red bbox <mask>",
                objects=objects,
                regions=[(1, box), (0, box), (1, box)],
            )
        ]
    )
    np.testing.assert_equal(batch.centres.tolist(), [[1, 1, 1], [7, 8, 9], nan])


# ---- points ----

CAMERA = (50.0, 60.0, 31.5, 23.5)


def slanted_plane(width=64, height=48):
    """Depth of the plane z = 2 + x / 2 - y / 4 seen at integer pixel centres -> (H, W), rays."""
    fx, fy, cx, cy = CAMERA
    u, v = np.meshgrid((np.arange(width) - cx) / fx, (np.arange(height) - cy) / fy)
    return 2 / (1 - u / 2 + v / 4), u, v


def test_the_point_map_of_a_plane_closed_form():
    depth, u, v = slanted_plane()
    points = point_grid(depth.astype(np.float32), CAMERA, (6, 8))
    np.testing.assert_allclose(
        points[..., 2], 2 + points[..., 0] / 2 - points[..., 1] / 4, atol=1e-5
    )
    mean = lambda a: a.reshape(6, 8, 8, 8).mean((1, 3))  # noqa: E731
    np.testing.assert_allclose(
        points, np.stack([mean(u * depth), mean(v * depth), mean(depth)], -1), atol=1e-5
    )
    p = processor()
    batch = p([example([picture(64, 48)], depths=[depth.astype(np.float32)], intrinsics=[CAMERA])])
    np.testing.assert_allclose(batch.points, in_merge_order(points, 2), atol=1e-6)


def test_means_are_over_valid_pixels_and_a_patch_without_any_is_nan():
    depth, u, _ = slanted_plane()
    depth[:8, :8], depth[0:8, 8:16:2], depth[8:12, :8], depth[12:16, :8] = 0, np.nan, np.inf, -1
    points = point_grid(depth.astype(np.float32), CAMERA, (6, 8))
    assert (
        np.isnan(points[0, 0]).all()
        and np.isnan(points[1, 0]).all()
        and np.isfinite(points).sum() == 46 * 3
    )
    keep = (slice(0, 8), slice(9, 16, 2))
    np.testing.assert_allclose(
        points[0, 1, [0, 2]], [(u * depth)[keep].mean(), depth[keep].mean()], atol=1e-5
    )


def test_depth_files_are_millimetres_and_must_fit(tmp_path):
    depth, *_ = slanted_plane()
    Image.fromarray((depth * 1000).round().astype(np.uint16)).save(tmp_path / "d.png")
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(tmp_path / "grey.png")
    p, image = processor(), picture(64, 48)
    a = p([example([image], depths=[str(tmp_path / "d.png")], intrinsics=[CAMERA])]).points
    b = p([example([image], depths=[depth.astype(np.float32)], intrinsics=[CAMERA])]).points
    np.testing.assert_allclose(a, b, atol=1e-3)
    for bad in (tmp_path / "grey.png", tmp_path / "none.png", np.ones((48, 63), np.float32)):
        with pytest.raises(ValueError, match="row 7: image 0"):
            p([example([image], depths=[bad], intrinsics=[CAMERA])])


def test_without_depth_there_are_no_points_and_without_intrinsics_60_degrees(capsys):
    p, a, b = processor(), picture(64, 48, 1), picture(64, 48, 2)
    depth = np.full((48, 64), 2, np.float32)
    assert (
        p([example([a]), example([b], depths=[None])]).points is None
        and p([example()]).points is None
    )
    batch = p([example([a], depths=[depth], intrinsics=[None]), example([b])])
    assert batch.points[:48].isfinite().all() and batch.points[48:].isnan().all()
    assert p.images.assumed_fov == 1
    p([example([b], depths=[depth])])
    assert p.images.assumed_fov == 2 and capsys.readouterr().err.count("60 degrees") == 1
    edge = 31.5 / (32 / np.tan(np.pi / 6)) * 2  # the outermost pixel's centre
    np.testing.assert_allclose(
        batch.points[:48, 0].max(), edge * 28 / 31.5, rtol=1e-5
    )  # mean of the last 8 columns


# ---- packing ----


def test_a_prompt_is_built_once_and_packed_any_number_of_times():
    p, examples = processor(), questions()[:3]
    prompts = [p.prompt(e) for e in examples]
    assert [one.ids.tolist() for one in prompts] == [p.prompt_ids(e) for e in examples]
    for completions in (None, [[p.target_ids(e)] for e in examples], [[[5, 6], [7]]] * 3):
        wanted = p(examples, completions)
        for given in (prompts, [prompts[0], *examples[1:]]):
            batch = p(given, completions)
            assert batch.segments == wanted.segments
            for name in ("input_ids", "position_ids", "patches", "region_weight", "predict_from"):
                assert torch.equal(getattr(batch, name), getattr(wanted, name)), name
        assert torch.equal(p.pack(prompts, completions).targets, wanted.targets)
    twice = p([examples[0]] * 2, [[[5]], [[6]]])
    assert torch.equal(p.pack([prompts[0]] * 2, [[[5]], [[6]]]).image_rows, twice.image_rows)
    assert len(twice.image_rows) == len(twice.image_at)


def questions():
    a, b, depth = picture(64, 48, 1), picture(96, 64, 2), np.full((48, 64), 2, np.float32)
    rest = dict(rationale="So it is.", depths=[depth], intrinsics=[CAMERA])
    marks = dict(
        regions=[(0, (3, 4, 20, 30)), (0, (40, 8, 60, 44))],
        objects={"red": (1, 2, 3), "blue": (4, 5, 6)},
    )
    one = dict(regions=marks["regions"][1:], objects=marks["objects"])
    return [
        example([a], "Is red <mask> left of blue <mask>?", **marks, **rest),
        example(
            [a],
            "Is red <mask> left of blue <mask>?",
            **marks | {"regions": marks["regions"][::-1]},
            **rest,
        ),
        example(
            [a],
            "How deep is blue <mask>?",
            path="dtr",
            **one | {"objects": {"blue": (4, 5, 6)}},
            **rest,
        ),
        example([b], "What?", rationale="Fine.", depths=None),
        example([a, b], "Both?", rationale="Yes."),
        example([], "No image at all?", rationale="None."),
    ]


def sequences(batch):
    """Each sequence with its prefix, as attention sees it: (ids, positions, targets, ids that
    predict)."""
    owner = {}
    for start, end, low, high in batch.segments:
        for at in range(start, end):
            owner[at] = [*range(low, high), *range(start, end)]
    for s in range(len(batch.cu_targets) - 1):
        span = slice(int(batch.cu_targets[s]), int(batch.cu_targets[s + 1]))
        at = owner[int(batch.predict_from[span][-1])]
        yield (
            batch.input_ids[at].tolist(),
            batch.position_ids[:, at].tolist(),
            batch.targets[span].tolist(),
            batch.input_ids[batch.predict_from[span]].tolist(),
        )


def check_tiling(batch):
    assert [s[0] for s in batch.segments] == [0, *(s[1] for s in batch.segments[:-1])]
    assert batch.segments[-1][1] == len(batch.input_ids) == batch.position_ids.shape[1]
    whole = {(start, end) for start, end, *_ in batch.segments}
    assert all(low == high or (low, high) in whole for *_, low, high in batch.segments)


def test_questions_of_one_image_share_it_and_equal_the_unshared():
    p, examples = processor(), questions()
    answers = [[p.target_ids(e)] for e in examples]
    batch = p(examples, answers)
    check_tiling(batch)
    alone = [p([e], [c]) for e, c in zip(examples, answers, strict=True)]
    assert list(sequences(batch)) == [next(sequences(one)) for one in alone]
    assert len(batch.input_ids) < sum(len(one.input_ids) for one in alone)
    assert [s[3] - s[2] > 0 for s in batch.segments] == [
        False,
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    assert len(batch.image_grid_thw) == 3  # a with depth, b, and a without
    assert (batch.input_ids == p.image_token_id).sum() == len(batch.image_rows)
    for k, e in enumerate(examples):
        assert batch.input_ids[batch.last[k]] == alone[k].input_ids[alone[k].last[0]]
        assert batch.next_position[k] == alone[k].next_position[0] and alone[
            k
        ].targets.tolist() == p.target_ids(e)
    for name in ("centres", "region_weight"):
        torch.testing.assert_close(
            getattr(batch, name), torch.cat([getattr(one, name) for one in alone])
        )
    assert (batch.input_ids[batch.region_token] == p.mask_id).all() and len(batch.region_token) == 5
    patches = [one.region_patch for one in alone[:3]]  # all on the first image
    assert torch.equal(batch.region_patch, torch.cat(patches))
    assert torch.equal(
        batch.region_id,
        torch.cat([one.region_id + at for one, at in zip(alone, (0, 2, 4), strict=False)]),
    )


def test_texts_that_begin_alike_share_their_beginning():
    p = processor()
    rules = "Answer with one word. " * 8
    asked = [rules + "What is left of red?", rules + "What is near?", "Where am I?", rules + "Why?"]
    examples = [Example(f"t{i}", "direct", [], text, "blue") for i, text in enumerate(asked)]
    answers = [[p.target_ids(e)] for e in examples]
    batch = p(examples, answers)
    check_tiling(batch)
    alone = [p([e], [c]) for e, c in zip(examples, answers, strict=True)]
    assert list(sequences(batch)) == [next(sequences(one)) for one in alone]
    # The first two share a segment; the others have nothing in common with their neighbour.
    assert [s[3] - s[2] > 0 for s in batch.segments] == [False, True, True, False, False]
    in_common = len(p.prompt_ids(examples[3])) // 2
    assert len(batch.input_ids) < sum(len(one.input_ids) for one in alone) - in_common


def test_the_first_target_is_predicted_from_the_last_prompt_token():
    p, e = processor(), questions()[0]
    batch = p([e], [[p.target_ids(e)]])
    prompt_length = len(p.prompt_ids(e))
    assert batch.predict_from.tolist() == [prompt_length - 1 + i for i in range(len(batch.targets))]
    assert batch.input_ids[batch.predict_from[1:]].tolist() == batch.targets[:-1].tolist()
    assert (
        batch.last.tolist() == [prompt_length - 1]
        and len(batch.input_ids) == prompt_length + len(batch.targets) - 1
    )


def test_a_group_shares_its_whole_prompt_once():
    p, (e, other, *_) = processor(), questions()
    group = [[5, 6, 7, p.end_id], [8], [9, 10]]
    batch = p([e, other], [group, [[11, 12], [13, 14, 15]]])
    check_tiling(batch)
    length = len(p.prompt_ids(e))
    assert len(batch.input_ids) == length + 3 + 0 + 1 + length + 1 + 2
    alone = [
        p([x], [[c]])
        for x, c in [
            (e, group[0]),
            (e, group[1]),
            (e, group[2]),
            (other, [11, 12]),
            (other, [13, 14, 15]),
        ]
    ]
    got, want = list(sequences(batch)), [next(sequences(one)) for one in alone]
    assert got == want
    assert batch.cu_targets.tolist() == [0, 4, 5, 7, 9, 12] and len(batch.region_token) == 4
    assert (
        batch.last.tolist() == [length - 1, 2 * length + 3] and batch.predict_from[4] == length - 1
    )
    assert len(batch.image_rows) == 2 * 12 and len(batch.image_grid_thw) == 1


def test_batch_moves_and_survives_examples_without_anything():
    batch = processor()([example()]).to("cpu")
    assert batch.pixel_values is None and batch.image_grid_thw is None and batch.points is None
    assert (
        batch.centres.shape == batch.sizes.shape == (0, 3) and batch.image_rows.dtype == torch.int64
    )
    assert batch.region_weight.dtype == torch.float32 and batch.region_token.shape == (0,)


def test_no_examples_make_an_empty_batch():
    p = processor()
    for batch in (p([]), p([], [])):
        assert batch.position_ids.shape == (3, 0) and batch.input_ids.shape == batch.last.shape == (
            0,
        )
        assert (
            batch.segments == [] and batch.cu_targets.tolist() == [0] and batch.pixel_values is None
        )
    with pytest.raises(ValueError):
        p([example()], [])
