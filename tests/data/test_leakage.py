"""Scenes on both sides: the planted ones are found, under whatever field names them, and no other."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from published import parquet

from data import leakage
from data.leakage import ARKIT, SCANNET, SCANNETPP, Scene, scenes_in
from errors import UserError
from training import run


def benchmark(folder: Path, *scenes: tuple[str, str]) -> str:
    """EmbSpatial-Bench's file with these (source, scene)s; no images, which nobody needs."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "question_id": f"{source}_{k}",
            "data_source": source,
            "scene_id": scene,
            "image": "x" * 2000,
        }
        for k, (source, scene) in enumerate(scenes)
    ]
    (folder / "embspatial_bench.json").write_text(json.dumps(rows))
    return f"embspatial={folder}"


# Three are trained on below: one in another scan of its room.
ASKED = [
    ("scannet", "scene0000_00"),
    ("scannet", "scene0707_00"),
    ("scannetpp", "09c1414f1b"),
    ("scannetpp", "7b6477cb95"),
    ("arkitscenes", "41069025"),
    ("arkitscenes", "41069021"),
    ("mp3d", "2azQ1b91cZZ"),
]
TRAINED = [
    "scannet/scene0000_01/color/0.jpg",
    "scannet/scene0000_02/color/000123.jpg",
    "scannet/scene0001_00/color/41069.jpg",
    "structured3d/scene_00707/0.jpg",
    "scannetpp/09c1414f1b/DSC00001.jpg",
    "scannetpp/c50d2d1d42/DSC00001.jpg",
    "videos/41069025/7.jpg",
    "videos/41069022/7.jpg",
    "other/000000041069/1.jpg",
]


def training_set(folder: Path) -> str:
    """Rows in our own format, one of each image, in both paths."""
    rows = []
    for k, image in enumerate(TRAINED):
        file = folder / image
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 24), (k, 9, 9)).save(file)
        for path in ("lor", "direct"):
            rows.append(
                {
                    "id": f"{k}-{path}",
                    "path": path,
                    "images": [image],
                    "question": "?",
                    "answer": "B",
                }
            )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


LEAKS = {
    Scene(SCANNET, "scene0000"): (4, {"scene0000_01", "scene0000_02"}),
    Scene(SCANNETPP, "09c1414f1b"): (2, {"09c1414f1b"}),
    Scene(ARKIT, "41069025"): (2, {"41069025"}),
}


def test_planted_scenes_are_found_and_no_others(tmp_path, capsys):
    asked = benchmark(tmp_path / "bench", *ASKED)
    config = leakage.Config(train=(training_set(tmp_path / "train"),), benchmark=(asked,))
    with pytest.raises(SystemExit) as ended:
        leakage.run(config)
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "training: 14 of 18 rows name a scene" in said
    assert "embspatial: 6 of 7 rows name a scene: 2 of ARKitScenes, 2 of ScanNet" in said
    assert (
        "ScanNet: scenes on both sides 1 (in the same scan 0, in another scan of the room 1)"
        in said
    )
    assert (
        "scene0000: training rows 4, of scene0000_01, scene0000_02; asked about scene0000_00"
        in said
    )
    found = leakage.main(config)["embspatial"]
    assert {
        room: (leak.rows, {s.scan for s in leak.trained}) for room, leak in found.items()
    } == LEAKS


def test_nothing_on_both_sides_ends_well(tmp_path, capsys):
    asked = benchmark(tmp_path / "bench", ("scannet", "scene0707_00"))
    leakage.run(leakage.Config(train=(training_set(tmp_path / "train"),), benchmark=(asked,)))
    assert "no scene stands on both sides" in capsys.readouterr().out


def test_a_set_that_names_no_scene_is_said_to(tmp_path, capsys):
    asked = benchmark(tmp_path / "bench", ("mp3d", "2azQ1b91cZZ"))
    leakage.run(leakage.Config(train=(training_set(tmp_path / "train"),), benchmark=(asked,)))
    assert (
        "embspatial: none of its rows (1) names a scene: nothing is known"
        in capsys.readouterr().out
    )


def test_a_field_of_a_parquet_names_the_scene(tmp_path):
    rows = [
        {"problem": "?", "answer": "B", "image": b"", "video_id": 41069025, "about": "ARKitScenes"},
        {"problem": "?", "answer": "B", "image": b"", "video_id": 41069026, "about": "ARKitScenes"},
    ]
    parquet(tmp_path / "set" / "train-0.parquet", rows)
    asked = benchmark(tmp_path / "bench", *ASKED)
    found = leakage.main(leakage.Config(train=(f"vqa:{tmp_path / 'set'}",), benchmark=(asked,)))
    assert found["embspatial"].keys() == {Scene(ARKIT, "41069025")}


def drop(tmp_path, **changes):
    asked = benchmark(tmp_path / "bench", *ASKED)
    source = training_set(tmp_path / "train")
    cfg = SimpleNamespace(data=[source], eval_data=[source], skip_bad_rows=False, out=str(tmp_path))
    cfg.drop_leaks = (asked,)
    vars(cfg).update(changes)
    return run.load_data(cfg)


def test_drop_leaks_leaves_their_rows_out_of_training_alone(tmp_path, capsys):
    training, validation = drop(tmp_path)
    assert {int(e.id.split("-")[0]) for e in training} == {2, 3, 5, 7, 8}
    assert len(training) == 10 and len(validation) == 18
    said = capsys.readouterr().out
    assert "8 of 18 training rows are left out: 8 show scenes of embspatial" in said


def test_drop_leaks_of_no_benchmark_is_a_users_mistake(tmp_path):
    for name in ("nosuch=x", f"embspatial={tmp_path / 'none'}"):
        with pytest.raises(UserError):
            drop(tmp_path, drop_leaks=(name,))


def scans(*texts, name="image"):
    return {(s.set, s.scan) for s in scenes_in([(name, text) for text in texts])}


@pytest.mark.parametrize(
    "texts, wanted",
    [
        (["ViewSpatial-Bench/scannetv2_val/scene0011_00/280.jpg"], {(SCANNET, "scene0011_00")}),
        (["scene0261_00_16"], {(SCANNET, "scene0261_00")}),
        (["the scene0261"], {(SCANNET, "scene0261")}),
        (["scene_01234/0.jpg", "scene01234_00", "obscene0000_00"], set()),
        (["scannetpp/0123456789/a.jpg"], {(SCANNETPP, "0123456789")}),
        (["0123456789", "abcdefabcd", "00123456789abcdef"], set()),
        (["ca1m-train-45261179"], {(ARKIT, "45261179")}),
        (["arkitscenes", "Training/421254/lowres_wide/000123.png"], {(ARKIT, "421254")}),
        (["arkitscenes", "arkitscenes/421254.mp4"], {(ARKIT, "421254")}),
        (["arkitscenes", "421254 chairs", "0.41069025", "12345"], set()),
        (["COCO_train2014_000000412540.jpg"], set()),
    ],
)
def test_what_names_a_scene(texts, wanted):
    assert scans(*texts) == wanted
