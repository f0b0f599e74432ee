"""One reader for every image: its pixels are Pillow's and transformers', however a file is held."""

import base64
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from tiny_checkpoint import checkpoint
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
import eval as evaluation
from data import depth
from data.checks import check
from data.headers import measure
from data.marks import DepthMap, Marked
from data.sets.refcoco import Reference
from model.head3d import read_depth
from model.processor import Processor
from pictures import BadPicture, picture_size, read_picture
from reporting.views import Views
from srreal import Example

ORIENTATION = 0x0112


def noise(width=40, height=24, channels=3) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (height, width, channels), np.uint8)
    return Image.fromarray(values.squeeze())


def content(image: Image.Image, kind: str, orientation: int | None = None, **options) -> bytes:
    held = io.BytesIO()
    if orientation is not None:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    image.save(held, kind, **options)
    return held.getvalue()


def reference(held: bytes) -> Image.Image:
    """What Pillow makes of a file, upright, in its own mode."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(held)))


def sources(held: bytes, file: Path) -> dict:
    """The same file as everything that an image can be held in."""
    file.write_bytes(held)
    encoded = base64.b64encode(held).decode()
    return {
        "path": file,
        "text": str(file),
        "bytes": held,
        "data URI": f"data:image/png;base64,{encoded}",
        "PIL": Image.open(io.BytesIO(held)),
        "marked path": Marked(str(file)),
        "marked bytes": Marked(held),
        "marked data URI": Marked(f"data:image/png;base64,{encoded}"),
        "marked PIL": Marked(Image.open(io.BytesIO(held))),
        "parquet": Reference("a", held, None, "it", [1, 1, 5, 5]).examples({})[0].images[0],
    }


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_does(tmp_path, kind, orientation):
    held = content(noise(), kind, orientation)
    wanted = np.asarray(reference(held).convert("RGB"))
    for name, source in sources(held, tmp_path / "a").items():
        # The size first: it is asked for before the file is decoded.
        assert picture_size(source) == wanted.shape[1::-1], name
        assert np.array_equal(read_picture(source), wanted), name
        # What is read is upright, and stays so.
        assert picture_size(source) == wanted.shape[1::-1], name
        assert np.array_equal(read_picture(read_picture(source)), wanted), name


@pytest.mark.parametrize("orientation", [3, 6])
def test_tags_behind_the_pixels_and_in_xmp_count(orientation):
    """ExifTool writes a PNG's EXIF behind its pixels; some editors know XMP alone."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    tags = exif.tobytes()[6:]
    chunk = struct.pack(">I", len(tags)) + b"eXIf" + tags
    chunk += struct.pack(">I", zlib.crc32(b"eXIf" + tags))
    plain = content(noise(), "PNG")
    late = plain[:-12] + chunk + plain[-12:]
    xmp = content(noise(), "JPEG", xmp=f'<x tiff:Orientation="{orientation}"/>'.encode())
    for held in (late, xmp):
        wanted = reference(held)
        assert picture_size(held) == wanted.size
        assert np.array_equal(read_picture(held), wanted)


def test_tags_that_cannot_be_read_turn_nothing():
    held = content(noise(), "JPEG", exif=b"Exif\0\0nonsense")
    assert np.array_equal(read_picture(held), Image.open(io.BytesIO(held)))
    assert picture_size(held) == (40, 24)


def test_data_uris_in_all_their_spellings():
    held = content(noise(), "PNG")
    encoded = base64.b64encode(held).decode()
    lines = "\n".join(encoded[start : start + 76] for start in range(0, len(encoded), 76))
    escaped = "".join(f"%{byte:02x}" for byte in held)
    for uri in (
        f"data:image/png;base64,{encoded}",
        f"DATA:image/png;base64,{lines}",
        f"data:;base64,{encoded.rstrip('=')}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(held).decode()}",
        f"data:image/png,{escaped}",
    ):
        assert np.array_equal(read_picture(uri), noise()) and picture_size(uri) == (40, 24)


def palette(transparency) -> bytes:
    return content(noise(channels=1).convert("P"), "PNG", transparency=transparency)


def clear(mode: str) -> Image.Image:
    image = noise(channels=4)
    return image if mode == "RGBA" else image.convert(mode)


FILES = {
    "RGBA": lambda: content(clear("RGBA"), "PNG", 6),
    "LA": lambda: content(clear("LA"), "PNG", 8),
    "WebP with alpha": lambda: content(clear("RGBA"), "WEBP", 5, lossless=True),
    "palette, one clear colour": lambda: palette(7),
    "palette, a table of alphas": lambda: palette(bytes(range(256))),
    "RGB with a clear colour": lambda: content(
        noise(), "PNG", transparency=tuple(noise().getpixel((3, 3)))
    ),
    "grey": lambda: content(noise(channels=1), "PNG", 3),
    "CMYK": lambda: content(noise().convert("CMYK"), "JPEG", 6),
    "one bit": lambda: content(noise().convert("1"), "PNG"),
    "GIF": lambda: content(noise().convert("P"), "GIF", transparency=3),
    "float": lambda: content(noise().convert("F"), "TIFF", 6),
}


@pytest.mark.parametrize("name", FILES)
def test_transparency_and_modes_are_transformers_from_every_source(tmp_path, name):
    held = FILES[name]()
    theirs = Qwen2VLImageProcessorPil.from_pretrained(checkpoint("qwen2_5_vl"))
    wanted = theirs(reference(held), return_tensors="pt")["pixel_values"]
    processor = Processor.from_pretrained(checkpoint("qwen2_5_vl"))
    for held_in, source in sources(held, tmp_path / "a").items():
        batch = processor([Example("a", "direct", [source], "What?", "A")])
        assert batch.pixel_values.equal(wanted), held_in


def test_sixteen_bits_are_scaled_from_every_source(tmp_path):
    values = np.random.default_rng(0).integers(0, 65535, (24, 40), np.uint16)
    held = content(Image.fromarray(values), "PNG", 6)
    wanted = np.rot90(values >> 8, -1)
    for name, source in sources(held, tmp_path / "a").items():
        got = np.asarray(read_picture(source))
        assert np.array_equal(got, np.repeat(wanted[..., None], 3, 2)), name


def test_what_is_beyond_sixteen_bits_is_white():
    values = np.array([[65535, 70_000], [2**31 - 1, -5]], np.int32)
    assert np.asarray(read_picture(Image.fromarray(values)))[..., 0].tolist() == [
        [255, 255],
        [255, 0],
    ]


def test_a_bad_picture_is_named_in_one_short_line(tmp_path):
    half = content(noise(400, 400), "PNG")[:2000]
    (tmp_path / "half.png").write_bytes(half)
    encoded = base64.b64encode(half).decode()
    for source, name in (
        (str(tmp_path / "half.png"), "half.png"),
        (half, "an image of 2000 bytes"),
        (f"data:image/png;base64,{encoded}", "a data URI of"),
        ("data:image/png;base64,!", "a data URI of"),
        (str(tmp_path / "none.png"), "none.png"),
    ):
        for read in (read_picture, Marked(source).convert):
            with pytest.raises(BadPicture, match=name) as error:
                read(source) if read is read_picture else read()
            assert len(str(error.value)) < 200


# ---- Sets: sizes, boxes, depth


def row(**changes) -> dict:
    return {
        "id": "a",
        "path": "lor",
        "images": ["a.jpg"],
        "question": "How far is the box (red bbox <mask>)?",
        "answer": "2",
        "depths": ["d.png"],
        "regions": [[0, [2, 3, 22, 38]]],
    } | changes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.jpg").write_bytes(content(noise(), "JPEG", 6))  # shown as 24 x 40
    Image.fromarray(np.full((40, 24), 2100, np.uint16)).save(tmp_path / "d.png")
    Image.fromarray(np.full((24, 40), 2100, np.uint16)).save(tmp_path / "side.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row()))
    return tmp_path


def write(folder, **changes):
    (folder / "rows.jsonl").write_text(json.dumps(row(**changes)))
    return folder


def test_boxes_and_depth_refer_to_the_turned_image(folder):
    (example,) = data.load([folder])
    batch = Processor.from_pretrained(checkpoint("qwen2_5_vl"))([example])
    assert batch.points is not None and len(batch.region_weight)
    with pytest.raises(data.BadRows, match=r"outside its image: \(2, 3, 38, 22\), of \(24, 40\)"):
        data.load([write(folder, regions=[[0, [2, 3, 38, 22]]])])


LIES = r"it lies on its side. The image's EXIF orientation turns it; turn this likewise"


def test_depth_and_masks_of_the_unturned_image_are_refused(folder):
    with pytest.raises(
        data.BadRows, match=rf"depths: wrong size: \(40, 24\), not \(24, 40\): {LIES}"
    ):
        data.load([write(folder, depths=["side.png"])])
    # What lies beside the image is found by its name, and checked as well.
    (folder / "side.png").rename(folder / "a.depth.png")
    with pytest.raises(
        data.BadRows, match=rf"depths: wrong size: \(40, 24\), not \(24, 40\): {LIES}"
    ):
        data.load([write(folder, depths=None)])
    llava = {
        "image": "a.jpg",
        "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "A box."}],
    }
    (folder / "llava.jsonl").write_text(json.dumps(llava))
    with pytest.raises(data.BadRows, match=f"wrong shape: 40 x 24 for an image of 24 x 40: {LIES}"):
        data.load([folder / "llava.jsonl"])
    # Without data.load, at use.
    with pytest.raises(ValueError, match=rf"\(24, 40\), image of \(40, 24\): {LIES}"):
        read_depth(str(folder / "a.depth.png"), (40, 24))
    mask = Example("a", "lor", [str(folder / "a.jpg")], "A box <mask>?", "2")
    mask.regions = [(0, np.ones((24, 40), bool))]
    headers = measure(mask.images)
    assert ("regions", f"odd mask: (40, 24), not (24, 40): {LIES}") in check(mask, headers)


def test_the_size_is_read_without_decoding_and_remembered(folder, tmp_path_factory, monkeypatch):
    file = str(folder / "a.jpg")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
    assert measure([file]) == {file: (24, 40, "RGB")}
    assert measure([file]) == {file: (24, 40, "RGB")}

    def fail(self):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("another")))
    assert measure([file], decoded=0) == {file: (24, 40, "RGB")}
    assert picture_size(content(noise(), "PNG", 8)) == (24, 40)


def test_depth_maps_turn_by_their_own_tags(tmp_path):
    values = np.arange(24 * 40, dtype=np.uint16).reshape(24, 40) + 500
    (tmp_path / "d.png").write_bytes(content(Image.fromarray(values), "PNG", 6))
    wanted = np.rot90(values, -1).astype(np.float32) / 1000
    assert np.array_equal(read_depth(str(tmp_path / "d.png"), (40, 24)), wanted)
    assert np.array_equal(DepthMap(str(tmp_path / "d.png"), (24, 40)), wanted)


def test_depth_is_estimated_of_the_upright_image(folder, monkeypatch):
    asked = []

    class Model:
        config = None

    def predict(model, processor, images):
        asked.extend(images)
        return [np.full(image.size[::-1], 2.0, np.float32) for image in images]

    monkeypatch.setattr(depth, "load_model", lambda name: (Model, None))
    monkeypatch.setattr(depth, "kind_of", lambda config: "metric")
    monkeypatch.setattr(depth, "predict", predict)
    depth.main(depth.Config((str(write(folder, depths=None)),), "m"))
    (image,) = asked
    assert np.array_equal(image, reference((folder / "a.jpg").read_bytes()))
    assert data.load([folder])[0].depths == [str(folder / "a.depth.png")]


def test_blind_and_report_show_the_upright_image(folder):
    (example,) = data.load([folder])
    config = evaluation.Config("m", blind=True)
    grey = evaluation.seen(example, config)
    assert grey.images[0].size == (24, 40) and grey.regions == [(0, (0, 0, 24, 40))]
    views = Views()
    views.of_example(example)
    (view,) = views.packed(room=1e6)
    assert view["size"] == (24, 40)
    shown = view["src"].partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(shown))).size == (24, 40)


def test_answers_about_a_data_uri_are_kept_under_its_hash(folder):
    held = (folder / "a.jpg").read_bytes()
    uri = f"data:image/jpeg;base64,{base64.b64encode(held).decode()}"
    assert evaluation.image_name(uri).startswith("sha1 ") and len(evaluation.image_name(uri)) < 50
