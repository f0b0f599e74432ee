"""data.depth with tiny random depth models: what transformers predicts is in the PNGs, and is found
again."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from transformers import (
    AutoConfig,
    AutoModelForDepthEstimation,
    DepthAnythingConfig,
    Dinov2Config,
    DPTConfig,
    ZoeDepthConfig,
)
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
from transformers.models.zoedepth.image_processing_pil_zoedepth import ZoeDepthImageProcessorPil

import data
from data import depth
from data.depth import Config, kind_of, main, millimetres
from data.rows import estimated, estimated_name
from errors import UserError
from model.head3d import point_grid, read_depth

SIZES = {
    "a.png": (64, 48),
    "b.jpg": (48, 64),
    "sub/c.png": (64, 48),
    "sub/d.with.dots.png": (40, 40),
}


@pytest.fixture
def images(tmp_path):
    """A set of four images of three sizes; c has depth already."""
    rng, rows = np.random.default_rng(0), []
    (tmp_path / "sub").mkdir()
    for name, (w, h) in SIZES.items():
        noise = rng.integers(0, 255, (h // 8, w // 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((w, h)).save(tmp_path / name)
        rows.append(
            {"id": name, "path": "lor", "images": [name], "question": "How far?", "answer": "1"}
        )
    Image.fromarray(np.full((48, 64), 1234, np.uint16)).save(tmp_path / "c-depth.png")
    rows[2]["depths"] = ["c-depth.png"]
    rows.append(rows[0] | {"id": "again"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def backbone():
    return Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        out_features=["stage1", "stage2"],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )


def anything(folder, kind):
    torch.manual_seed(0)
    config = DepthAnythingConfig(
        backbone_config=backbone(),
        patch_size=14,
        reassemble_hidden_size=16,
        reassemble_factors=[2, 1],
        neck_hidden_sizes=[8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
        depth_estimation_type=kind,
        max_depth=20 if kind == "metric" else 1,
    )
    AutoModelForDepthEstimation.from_config(config).save_pretrained(folder)
    DPTImageProcessorPil(
        size={"height": 28, "width": 28}, keep_aspect_ratio=True, ensure_multiple_of=14
    ).save_pretrained(folder)
    return str(folder)


def said(folder, file):
    """What the model says, by transformers alone."""
    model = AutoModelForDepthEstimation.from_pretrained(folder).eval()
    processor = DPTImageProcessorPil.from_pretrained(folder)
    image = Image.open(file).convert("RGB")
    with torch.no_grad():
        out = model(**processor(images=image, return_tensors="pt")).predicted_depth
    resize = torch.nn.functional.interpolate
    return resize(out[None], image.size[::-1], mode="bicubic", align_corners=False)[0, 0].numpy()


def stored(file):
    with Image.open(file) as picture:
        return np.asarray(picture), picture.text, picture.mode


def test_metric_depth_is_kept_in_millimetres(images, tmp_path, capsys):
    model = anything(tmp_path / "model", "metric")
    main(Config((str(images),), model))
    for name in ("a.png", "b.jpg", "sub/d.with.dots.png"):
        values, text, mode = stored(estimated_name(str(images / name)))
        wanted = said(model, images / name) * 1000
        assert mode.startswith("I") and values.shape == SIZES[name][::-1] and values.max() > 0
        assert np.abs(values - wanted.clip(0, 65535)).max() <= 0.51  # rounded
        assert text == {"model": model, "kind": "metric"}
        metres = read_depth(estimated_name(str(images / name)), values.shape)
        assert np.isfinite(point_grid(metres, (50, 50, 32, 24), (2, 2))).any()
    assert not os.path.exists(estimated_name(str(images / "sub/c.png")))  # has its own
    assert "3 depth maps, metric" in capsys.readouterr().out
    assert os.path.basename(estimated_name("x/d.with.dots.png")) == "d.with.dots.depth.png"


def test_relative_depth_is_refused(images, tmp_path):
    model = anything(tmp_path / "model", "relative")
    with pytest.raises(UserError, match=f"--model {model}: relative depth has no unit"):
        main(Config((str(images),), model))
    assert not list(images.rglob("*.depth.png"))


def test_it_goes_on_where_it_was_cut_off(images, tmp_path, monkeypatch):
    model = anything(tmp_path / "model", "metric")
    files = [str(images / name) for name in SIZES if "c.png" not in name]
    main(Config((str(images),), model))
    before = {file: stored(estimated_name(file))[0] for file in files}
    stamp = os.stat(estimated_name(files[0])).st_mtime_ns
    os.remove(estimated_name(files[1]))
    # torn
    (images / "sub" / "d.with.dots.depth.png").rename(images / "sub" / "d.with.dots.depth.png.part")
    asked = []
    predict = depth.predict
    monkeypatch.setattr(depth, "predict", lambda m, p, i: asked.extend(i) or predict(m, p, i))
    main(Config((str(images),), model))
    assert len(asked) == 2 and os.stat(estimated_name(files[0])).st_mtime_ns == stamp
    assert all(np.array_equal(stored(estimated_name(file))[0], before[file]) for file in files)
    assert not list(images.rglob("*.part"))


def test_loaders_find_it(images, tmp_path):
    main(Config((str(images),), anything(tmp_path / "model", "metric")))
    assert estimated(str(images / "b.jpg")) == estimated_name(str(images / "b.jpg"))
    assert estimated(str(images / "sub/c.png")) is None


def test_relative_depth_is_not_taken_for_metres(images, tmp_path, capsys):
    """PNGs that say of themselves that they have no unit are left out by data.load, and said."""
    about = PngImagePlugin.PngInfo()
    about.add_text("kind", "relative")
    for name in ("a.png", "b.jpg"):
        depth = Image.fromarray(np.full(SIZES[name][::-1], 2000, np.uint16))
        depth.save(estimated_name(str(images / name)), pnginfo=about)
    first, second, *_ = data.load([images])
    assert first.images == [str(images / "a.png")]
    assert not any(first.depths or ()) and not any(second.depths or ())
    assert "3 depth maps left out: relative" in capsys.readouterr().out  # a.png has two rows
    os.remove(estimated_name(str(images / "a.png")))
    main(Config((str(images),), anything(tmp_path / "metric", "metric")))
    first, *_ = data.load([images])
    assert first.depths == [estimated_name(str(images / "a.png"))]


def test_kinds(tmp_path):
    assert kind_of(DPTConfig()) == "relative" and kind_of(ZoeDepthConfig()) == "metric"
    for kind in ("metric", "relative"):
        assert kind_of(AutoConfig.for_model("depth_anything", depth_estimation_type=kind)) == kind
    with pytest.raises(UserError, match="'bert': is its depth .* --kind metric"):
        kind_of(AutoConfig.for_model("bert"))


def test_zoedepths_padding_is_cut_off():
    """A constant depth stays constant, and of the image's own size: no padding is left in it."""
    pytest.importorskip("torchvision")  # transformers' cut needs it

    class Flat(torch.nn.Module):
        config, device = ZoeDepthConfig(), torch.device("cpu")

        def forward(self, pixel_values):
            from transformers.modeling_outputs import DepthEstimatorOutput

            flat = torch.full((len(pixel_values), *pixel_values.shape[2:]), 2.5)
            return DepthEstimatorOutput(predicted_depth=flat)

    processor = ZoeDepthImageProcessorPil(size={"height": 64, "width": 64})
    (found,) = depth.predict(Flat(), processor, [Image.new("RGB", (50, 30))])
    assert found.shape == (30, 50) and np.abs(found - 2.5).max() < 1e-5


def test_values_that_no_png_holds():
    odd = np.array([[np.nan, np.inf, -np.inf, -1], [0, 1.2344, 1.2346, 99]], np.float32)
    assert millimetres(odd).tolist() == [[0, 0, 0, 0], [0, 1234, 1235, 65535]]


def test_bad_input_is_named(images, tmp_path):
    with pytest.raises(UserError, match="--model .*no-such-model"):
        main(Config((str(images),), str(tmp_path / "no-such-model")))
    with pytest.raises(UserError, match="no such file or folder"):
        main(Config(("none",), "m"))
    with pytest.raises(UserError, match="--batch 0"):
        main(Config((str(images),), "m", batch=0))
    (images / "a.png").unlink()
    with pytest.raises(data.BadRows, match="missing file"):
        main(Config((str(images),), "m"))
