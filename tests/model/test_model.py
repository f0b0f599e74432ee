"""The model against transformers: logits, names and shapes of every published size, checkpoints
there and back.
"""

import json
import os
import shutil

import pytest
import torch
from PIL import Image
from published_sizes import BILLIONS, published
from safetensors.torch import load_file, save_file
from tiny_checkpoint import checkpoint
from tiny_models import FAMILIES, inputs, make, reference_logits
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from model.checkpoint import on_disk, rename
from model.files import CheckpointError
from model.head3d import head_loss
from model.images import DeviceImages
from model.processor import Processor
from model.qwen_vl import QwenVL, rope_axes
from model.region import RegionToken
from srreal import Example

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="a GPU's kernels and attention")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, side, tmp_path):
    reference = make(family)
    reference.save_pretrained(tmp_path)
    batch = inputs(side)
    ours, theirs = (
        QwenVL.from_pretrained(str(tmp_path)).logits(**batch),
        reference_logits(reference, batch),
    )
    keep = batch["attention_mask"].bool()
    assert ours.shape == theirs.shape
    assert (ours - theirs)[keep].abs().max() < 1e-4
    text = dict(input_ids=torch.tensor([[5, 6, 7, 8]]))
    assert (
        QwenVL.from_pretrained(str(tmp_path)).logits(**text) - reference_logits(reference, text)
    ).abs().max() < 1e-4


@pytest.mark.parametrize("name", list(published()))
def test_published_sizes(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published()[name]))
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        ours, theirs = QwenVL(config), AutoModelForImageTextToText.from_config(config)
    shapes = {rename(n): tuple(p.shape) for n, p in theirs.named_parameters()}
    spatial = ("region.", "points.", "head3d.")
    assert {
        n: tuple(p.shape) for n, p in ours.named_parameters() if not n.startswith(spatial)
    } == shapes
    count = sum(p.numel() for n, p in ours.named_parameters() if not n.startswith(spatial))
    assert round(count / 1e9, 3) == BILLIONS[name]


LAYOUTS = [(family, layout) for family in FAMILIES for layout in ("older", "newer")]
# Never published so, and transformers does not read it.
LAYOUTS = [case for case in LAYOUTS if case not in (("qwen3_vl", "older"), ("qwen3_5", "older"))]


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_round_trip_through_transformers(family, layout, tmp_path):
    reference = make(family, tied=family == "qwen2_5_vl").to(torch.bfloat16)
    reference.save_pretrained(tmp_path / "a")
    weights = load_file(tmp_path / "a/model.safetensors")
    names = {n: _swap(rename(n), layout) for n in weights}
    save_file(
        {names[n]: t for n, t in weights.items()},
        tmp_path / "a/model.safetensors",
        metadata={"format": "pt"},
    )
    (tmp_path / "a/NOTICE.txt").write_text("kept")

    model = QwenVL.from_pretrained(str(tmp_path / "a"))
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        model.decoder.norm.weight.mul_(1.5)
        model.head3d.out.bias[0] = 0.25
    model.save_pretrained(tmp_path / "b")
    saved = load_file(tmp_path / "b/model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in saved.items()} == {
        names[n]: (t.dtype, t.shape) for n, t in weights.items()
    }
    assert (tmp_path / "b/NOTICE.txt").read_text() == "kept"

    theirs, ours = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / "b"),
        QwenVL.from_pretrained(str(tmp_path / "b")),
    )
    assert torch.equal(theirs.model.language_model.norm.weight, ours.decoder.norm.weight)
    for (n, p), (m, q) in zip(model.named_parameters(), ours.named_parameters(), strict=True):
        assert n == m and torch.equal(p, q), n
    wide = theirs.float().eval()
    batch = inputs()
    keep = batch["attention_mask"].bool()
    logits = QwenVL.from_pretrained(str(tmp_path / "b"), dtype=torch.float32).logits(**batch)
    assert (logits - reference_logits(wide, batch))[keep].abs().max() < 1e-4


def _swap(ours: str, layout: str) -> str:
    prefixes = {"vision.": "visual.", "decoder.": "model."}
    if layout == "newer":
        prefixes = {"vision.": "model.visual.", "decoder.": "model.language_model."}
    for mine, disk in prefixes.items():
        if ours.startswith(mine):
            return disk + ours[len(mine) :]
    return ours


def test_sharded(tmp_path, monkeypatch):
    reference = make("qwen3_vl")
    reference.save_pretrained(tmp_path / "a", max_shard_size="100KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    model = QwenVL.from_pretrained(str(tmp_path / "a"))
    monkeypatch.setattr("model.checkpoint.SHARD_BYTES", 100_000)
    model.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b/model.safetensors.index.json").is_file()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "b")
    for (name, p), (_, q) in zip(
        reference.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(p, q), name


def test_saving_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    reference = make("qwen2_vl")
    reference.save_pretrained(tmp_path / "a")
    model = QwenVL.from_pretrained(str(tmp_path / "a"))
    model.save_pretrained(tmp_path / "b")
    before = (tmp_path / "b/model.safetensors").read_bytes()
    with torch.no_grad():
        model.decoder.norm.weight.mul_(2)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("model.checkpoint.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b/model.safetensors").read_bytes() == before
    monkeypatch.undo()
    model.save_pretrained(tmp_path / "b")
    assert torch.equal(
        QwenVL.from_pretrained(str(tmp_path / "b")).decoder.norm.weight, model.decoder.norm.weight
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]  # nothing left aside


def test_a_failed_or_killed_save_leaves_nothing_aside(tmp_path, monkeypatch):
    make("qwen2_vl").save_pretrained(tmp_path / "a")
    model, dead = QwenVL.from_pretrained(str(tmp_path / "a")), tmp_path / ".b.tmp"
    kept = [tmp_path / ".b.notes.tmp", tmp_path / ".c.tmp"]
    for folder in (dead, *kept):
        folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("model.checkpoint.save_file", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.save_pretrained(tmp_path / "b")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a", *kept])


def test_a_save_that_is_killed_between_its_renames_leaves_the_old_one(tmp_path, monkeypatch):
    """Read where it stands meanwhile, and put back by the next save."""
    make("qwen2_vl").save_pretrained(tmp_path / "a")
    model, b = QwenVL.from_pretrained(tmp_path / "a"), tmp_path / "b"
    model.save_pretrained(b)
    (b / "notes.md").write_text("mine")
    before = model.decoder.norm.weight.detach().clone()
    rename_directory = os.rename

    def killed_at_the_second(source, target):
        if target == b:
            raise KeyboardInterrupt
        rename_directory(source, target)

    with torch.no_grad():
        model.decoder.norm.weight.mul_(2)
    with monkeypatch.context() as patch:
        patch.setattr("model.checkpoint.os.rename", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(b)
    assert not b.exists()
    assert torch.equal(QwenVL.from_pretrained(b).decoder.norm.weight, before)
    model.save_pretrained(b)
    assert torch.equal(QwenVL.from_pretrained(b).decoder.norm.weight, 2 * before)
    assert (b / "notes.md").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_relative_point_maps_and_sliding_windows_are_refused_by_name(tmp_path):
    make("qwen2_vl").save_pretrained(tmp_path / "a")
    QwenVL.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    path = tmp_path / "b/spatial.safetensors"
    save_file(load_file(path), path, metadata={"points": "relative"})
    with pytest.raises(CheckpointError, match=r"spatial.safetensors: .*relative point maps[^\n]*$"):
        QwenVL.from_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "a/config.json").read_text())
    config["text_config"]["use_sliding_window"] = True
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="use_sliding_window is not supported"):
        QwenVL.from_pretrained(tmp_path / "a")


def test_saving_keeps_what_others_put_there_and_refuses_other_directories(tmp_path, monkeypatch):
    make("qwen2_vl").save_pretrained(tmp_path / "a")
    model, b = QwenVL.from_pretrained(str(tmp_path / "a")), tmp_path / "b"
    monkeypatch.setattr("model.checkpoint.SHARD_BYTES", 100_000)
    model.save_pretrained(b)
    (b / "logs" / "deep").mkdir(parents=True)
    (b / "logs" / "deep" / "loss.txt").write_text("1.5")
    (b / "notes.md").write_text("mine")
    (b / "latest").symlink_to("logs")
    (b / "dangling").symlink_to("nowhere")
    (b / "processor_config.json").write_text("{}")  # of an older save: must not outlive it
    monkeypatch.undo()
    (tmp_path / "link").symlink_to("b")
    model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (b / "latest").is_symlink()
    assert (b / "notes.md").read_text() == "mine" and (
        b / "latest/deep/loss.txt"
    ).read_text() == "1.5"
    ours = {p.name for p in b.iterdir()} - {"logs", "notes.md", "latest", "dangling"}
    model.save_pretrained(tmp_path / "fresh")
    assert ours == {p.name for p in (tmp_path / "fresh").iterdir()} and "model.safetensors" in ours
    QwenVL.from_pretrained(str(b))
    for other in (b / "logs", b / "notes.md"):
        with pytest.raises(CheckpointError, match=r"holds no checkpoint[^\n]*$"):
            model.save_pretrained(other)
    assert (b / "logs/deep/loss.txt").read_text() == "1.5"
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")


def test_saving_without_a_whole_processor_copies_the_files(tmp_path):
    for case in ("no preprocessor_config.json", "no room for <mask>", "no template"):
        a, out = tmp_path / case, tmp_path / f"{case}, saved"
        shutil.copytree(checkpoint("qwen2_vl"), a)
        if case.startswith("no pre"):
            (a / "preprocessor_config.json").unlink()
        elif case.endswith("template"):
            (a / "chat_template.jinja").unlink()
        else:
            rows = json.loads((a / "config.json").read_text())["text_config"]["vocab_size"]
            tokenizer = AutoTokenizer.from_pretrained(a)
            tokenizer.add_tokens([f"<x{i}>" for i in range(rows)])
            tokenizer.save_pretrained(a)
        QwenVL.from_pretrained(str(a)).save_pretrained(out)
        assert {p.name for p in a.iterdir()} == {p.name for p in out.iterdir()}
        assert (a / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
        QwenVL.from_pretrained(str(out))


def test_saving_when_the_source_has_gone_says_so_and_writes_nothing(tmp_path, monkeypatch):
    make("qwen2_vl").save_pretrained(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    model = QwenVL.from_pretrained("a")
    monkeypatch.chdir("/")
    model.save_pretrained(tmp_path / "b")  # a relative source is found from anywhere
    (tmp_path / "a").rename(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"a: gone since it was loaded[^\n]*$"):
        model.save_pretrained(tmp_path / "d")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c"]


def test_errors_are_one_line_and_name_the_culprit(tmp_path):
    make("qwen3_vl").save_pretrained(tmp_path / "a", max_shard_size="100KB")

    def broken(change) -> str:
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        shutil.copytree(tmp_path / "a", tmp_path / "x")
        change(tmp_path / "x")
        with pytest.raises(CheckpointError) as error:
            QwenVL.from_pretrained(str(tmp_path / "x"))
        assert "\n" not in str(error.value)
        return str(error.value)

    shard = sorted((tmp_path / "a").glob("*.safetensors"))[0].name

    def edit(path, **changes):
        weights = load_file(path / shard)
        for name, tensor in changes.items():
            weights.pop(name, None)
            if tensor is not None:
                weights[name] = tensor
        save_file(weights, path / shard)

    first = next(iter(load_file(tmp_path / "a" / shard)))
    ours = rename(first)
    assert shard in broken(lambda path: (path / shard).unlink())
    assert shard in broken(
        lambda path: (path / shard).write_bytes((path / shard).read_bytes()[:500])
    )
    assert f"lacks {on_disk(ours)}" in broken(lambda path: edit(path, **{first: None}))
    assert "unknown tensor extra.weight" in broken(
        lambda path: edit(path, **{"extra.weight": torch.zeros(2)})
    )
    assert on_disk(ours) in broken(lambda path: edit(path, **{first: torch.zeros(2, 2)}))
    whole = torch.ones(2, 2, dtype=torch.int8)
    assert f"{first} is int8" in broken(lambda path: edit(path, **{first: whole}))
    norm, index = "model.language_model.norm.weight", "model.safetensors.index.json"
    places = json.loads((tmp_path / "a" / index).read_text())["weight_map"]

    def without_norm(path):
        weights = load_file(path / places[norm])
        del weights[norm]
        save_file(weights, path / places[norm])

    assert f"lacks {norm}" in broken(without_norm)
    for text in (
        "",
        '{"weight_map": {"a',
        "[]",
        "{}",
        '{"weight_map": null}',
        '{"weight_map": []}',
    ):
        assert index in broken(lambda path, text=text: (path / index).write_text(text))
    assert "llama" in broken(
        lambda path: (path / "config.json").write_text('{"model_type": "llama"}')
    )
    assert "config.json" in broken(lambda path: (path / "config.json").unlink())
    with pytest.raises(CheckpointError, match="no such directory"):
        QwenVL.from_pretrained(str(tmp_path / "nowhere"))


def test_spatial_parts_at_their_start_change_nothing(tmp_path):
    """Bitwise: a point map at its initial weights, on a pretrained model without any `<mask>`."""
    make("qwen3_vl").save_pretrained(tmp_path)
    model, batch = QwenVL.from_pretrained(str(tmp_path)), inputs()
    plain = model.logits(**batch)
    features, _ = model.vision(batch["pixel_values"], batch["image_grid_thw"])
    points = torch.randn(len(features), 3, generator=torch.Generator().manual_seed(1))
    points[::3] = float("nan")
    assert torch.equal(features + model.points(points), features)
    assert torch.equal(model.logits(**batch), plain)
    model.points(points).sum().backward()
    assert model.points.down.weight.grad.abs().sum() > 0  # silent, but it learns


def test_region_token_starts_as_loud_as_an_embedding(tmp_path):
    make("qwen2_vl").save_pretrained(tmp_path)
    model = QwenVL.from_pretrained(str(tmp_path))
    features = torch.randn(40, 32, generator=torch.Generator().manual_seed(2)) * 7 + 3
    region = torch.arange(20).repeat_interleave(2)
    tokens = model.region(features, region, torch.arange(40), torch.full((40,), 0.5), 20)
    rms = model.decoder.embed_tokens.weight.pow(2).mean().sqrt()
    assert 0.7 < tokens.pow(2).mean().sqrt() / rms < 1.4


def pooling(width: int) -> RegionToken:
    """A RegionToken that returns what it has pooled."""
    token = RegionToken(width, width)
    token.norm = token.proj = torch.nn.Identity()
    return token


def in_bf16_one_by_one(terms: torch.Tensor) -> torch.Tensor:
    """Their sum as CUDA's index_add into bf16 makes it: rounded after every addition."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


@pytest.mark.parametrize("patches", [1, 256, 1024, 2912])
def test_a_region_token_of_many_patches_in_bf16(patches):
    """A mean over the region as good as bf16 can say it: sums in fp32, rounded once."""
    generator = torch.Generator().manual_seed(patches)
    features = (1 + torch.randn(patches + 8, 64, generator=generator)).to(DEVICE, torch.bfloat16)
    patch = torch.randperm(patches + 8, generator=generator)[:patches].to(DEVICE)
    region = torch.zeros(patches, dtype=torch.int64, device=DEVICE)
    weight = torch.full((patches,), 1 / patches, device=DEVICE)
    ours = pooling(64)(features, region, patch, weight, 1)[0]
    truth = (features[patch].double() * weight[:, None].double()).sum(0)
    bound = 2**-8 * truth.norm()
    assert ours.dtype == torch.bfloat16 and (ours - truth).norm() < bound
    if patches >= 1024:
        terms = features[patch] * weight[:, None].bfloat16()
        assert (in_bf16_one_by_one(terms) - truth).norm() > 10 * bound


def test_regions_that_share_patches_sum_their_gradients_in_fp32():
    """600 regions over the same 16 patches, and one without any patch."""
    count, patches = 600, 16
    features = torch.ones(patches, 8, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    region = torch.arange(count, device=DEVICE).repeat_interleave(patches)
    patch = torch.arange(patches, device=DEVICE).repeat(count)
    weight = torch.full((count * patches,), 1 / patches, device=DEVICE)
    pooled = pooling(8)(features, region, patch, weight, count + 1)
    assert torch.equal(pooled[:count].float(), torch.ones_like(pooled[:count]).float())
    assert not pooled[count].any()
    (grad,) = torch.autograd.grad(pooled.float().sum(), features)
    assert ((grad - count / patches).abs() < 2**-8 * count / patches).all()
    terms = torch.full((count, 1), 1 / patches, dtype=torch.bfloat16)
    assert in_bf16_one_by_one(terms).item() < 0.5 * count / patches


@needs_cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_on_a_gpu_equals_that_of_a_cpu(family):
    """A group behind its prompt, with image, depth and regions: log-probs and the gradient in
    bf16."""
    folder = checkpoint(family)
    processor = Processor.from_pretrained(folder)
    pixels = torch.randint(256, (64, 96, 3), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels.to(torch.uint8).numpy())
    depth = 1 + torch.rand(64, 96, generator=torch.Generator().manual_seed(1)).numpy()
    example = Example(
        "0",
        "lor",
        [image],
        "Is <mask> behind <mask>?",
        "a",
        regions=[(0, (4, 4, 40, 50)), (0, (0, 0, 96, 64))],
        depths=[depth],
        intrinsics=[(90.0, 90.0, 48.0, 32.0)],
    )
    batch = processor([example], [[list(range(40, 40 + n)) for n in (9, 1, 12)]])
    found = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        model = QwenVL.from_pretrained(str(folder), device, dtype)
        model.checkpoint_blocks()
        images = DeviceImages(device)
        output = model(batch.to(device, images))
        output.logprob.sum().backward()
        norm = torch.stack(
            [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
        ).norm()
        found.append((output.logprob.detach().cpu(), output.centres.detach().cpu(), norm.cpu()))
    (logprob, centres, norm), (ours, our_centres, our_norm) = found
    assert (logprob - ours).abs().max() < 0.05 and (centres - our_centres).abs().max() < 0.05
    assert abs(our_norm / norm - 1) < 0.05


def test_gradients_of_region_token_and_head_reach_the_patches(tmp_path):
    """Of the patches of its region and of no other; the token by its weights, the head by
    differences."""
    make("qwen3_vl").save_pretrained(tmp_path)
    model = QwenVL.from_pretrained(str(tmp_path)).double()
    features = torch.randn(9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    features.requires_grad_()
    patch, weight = (
        torch.tensor([0, 3, 3, 7]),
        torch.tensor([0.25, 0.75, 0.5, 0.5], dtype=torch.float64),
    )
    region, truth = torch.tensor([0, 0, 1, 1]), torch.tensor([[0.1, 0.2, 2.0], [torch.nan] * 3])

    def loss(features, owner=slice(None)):
        tokens = model.region(features, region, patch, weight, 2)
        centres, sizes = model.head3d(tokens)
        return tokens[owner].square().sum(), head_loss(
            centres, sizes, truth, torch.full((2, 3), torch.nan)
        )

    for owner, seen in ((0, [0, 3]), (1, [3, 7])):
        (grad,) = torch.autograd.grad(loss(features, owner)[0], features)
        assert grad.abs().sum(1).nonzero()[:, 0].tolist() == seen
    # only the first region's centre is known
    (grad,) = torch.autograd.grad(loss(features)[1], features)
    assert grad.abs().sum(1).nonzero()[:, 0].tolist() == [0, 3]
    with torch.no_grad():
        bump = torch.zeros_like(features)
        bump[3, 5] = 1e-2  # the head answers in fp32
        slope = (loss(features + bump)[1] - loss(features - bump)[1]) / 2e-2
    assert slope.item() == pytest.approx(grad[3, 5].item(), rel=0.05, abs=1e-4)


def test_head_loss_in_closed_form():
    """Smooth-L1 with its bend at 0.1 m: d^2 / 0.2 below, d - 0.05 above; rows of NaN count for
    nothing."""
    centres = torch.tensor([[0.0, 0.0, 2.0], [5.0, 5.0, 5.0]], requires_grad=True)
    sizes, nan = torch.ones(2, 3), torch.full((3,), torch.nan)
    truth = torch.stack([torch.tensor([0.05, -1.0, 2.0]), nan])
    total = head_loss(centres, sizes, truth, torch.stack([nan, torch.tensor([1.0, 1.3, 1.0])]))
    assert total.item() == pytest.approx(0.05**2 / 0.2 + 0.95 + 0.25)
    total.backward()
    assert torch.allclose(centres.grad, torch.tensor([[-0.5, 1.0, 0.0], [0.0, 0.0, 0.0]]))


def test_rope_axes():
    assert rope_axes((2, 1, 1), interleaved=False).tolist() == [0, 0, 1, 2]
    assert rope_axes((4, 2, 2), interleaved=True).tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
