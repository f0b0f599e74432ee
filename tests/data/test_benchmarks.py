"""Benchmarks: every set from a fixture in its published schema; scorers against hand-computed
values; eval on 1 and 2 ranks, and interrupted."""

import base64
import io
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from commands import ROOT
from eval_set import stand_in
from PIL import Image, ImageDraw
from published import IMAGE
from published import parquet as write

import eval as evaluation
from data import BadRows, benchmarks
from data.benchmarks.answers import mra, read_number
from data.benchmarks.schema import Benchmark, Item, by_sample, equal
from data.boxes import box_iou
from data.rooms.render import render
from data.rooms.scene import furnish, scene
from errors import UserError
from model import tiny
from srreal import Example
from training import run

PICTURES = [scene(7, k, (96, 72))[1][0] for k in range(4)]


def png(k: int) -> bytes:
    out = io.BytesIO()
    PICTURES[k].save(out, "PNG")
    return out.getvalue()


def image(k: int) -> dict:
    return {"bytes": png(k), "path": f"{k}.png"}


@pytest.fixture(autouse=True)
def small():
    """The fixtures are small, and that is said: one test looks for it."""
    with pytest.warns(UserWarning):
        warnings.warn("small", stacklevel=1)
        yield


def pixels(picture) -> list:
    return np.asarray(picture.convert("RGB")).tolist()


# ---- Each set in its published schema

SPAR = [
    ("depth_prediction_oo", "fill", "How deep is the towel?", "0.9", 1),
    ("position_matching", "select", "Which box?\nA. [1,2,3,4]\nB. [2,3,4,5]", "B", 2),
    ("view_change_infer", "fill", "How did the camera move?", "move_right:0.4,rotate_right:60", 2),
    (
        "distance_infer_center_oo",
        "select",
        "Nearest?\nA. the chair (red bbox)\nB. the lamp (blue bbox)",
        "A",
        1,
    ),
]


def spar_bench(folder: Path) -> str:
    rows = [
        dict(
            id=k + 10,
            img_type="multi_view" if n > 1 else "single_view",
            format_type=form,
            task=task,
            source="scannet",
            image=[image(j) for j in range(n)],
            question=question,
            answer=answer,
        )
        for k, (task, form, question, answer, n) in enumerate(SPAR)
    ]
    write(folder / "data" / "test-00000-of-00001.parquet", rows, image=pa.list_(IMAGE))
    return str(folder)


def test_spar_bench(tmp_path):
    for name in ("spar-bench", "spar-bench-tiny"):
        got = benchmarks.load(name, spar_bench(tmp_path))
        assert [(e.task, e.question, e.answer, len(e.images)) for e in got] == [
            (task, question, answer, n) for task, _, question, answer, n in SPAR
        ]
        assert {e.path for e in got} == {"lor"} and got[1].id == "11" and not got[1].regions
        assert pixels(got[1].images[1]) == pixels(PICTURES[1]) and got[1].images[1].size == (96, 72)
    number, choice, motion, _ = benchmarks.load("spar-bench", str(tmp_path), "direct")
    assert (
        number.question
        == f"\n{SPAR[0][2]}\nPlease answer the question using a single word or phrase."
    )
    assert choice.question.startswith(
        f"\n{SPAR[1][2]}\nThe values represent the bounding box coordinates"
    )
    assert choice.question.endswith(
        "image.\nAnswer with the option's letter from the given choices directly."
    )
    assert motion.question == f"\n{SPAR[2][2]}\n\n" and motion.path == "direct"
    assert [e.task for e in benchmarks.load("spar-bench/position_matching", str(tmp_path))] == [
        SPAR[1][0]
    ]


def test_spar_bench_region_prompts(tmp_path):
    """DTR has its own text and regions, in the order of the masks, where there is a region
    prompt."""
    one = SPAR[3][2].replace("red bbox", "red bbox <mask>").replace("blue bbox", "blue bbox <mask>")
    two = "Which box (red bbox <mask>) is it, seen from (blue point <mask>)?"
    prompts = {
        "13": dict(
            question_region=one,
            visual_prompt=["red bbox", "blue bbox"],
            bbox=[[1, 2, 30, 40], [5, 6, 70, 71]],
            mask_idx=2,
        ),
        "11": dict(
            question_region=two,
            visual_prompt=["red bbox", "blue point"],
            bbox={"0": [[9, 9, 20, 20]], "1": [[1, 1, 8, 8]]},
            mask_idx={"0": [1, 0], "1": [0, 0]},
        ),
        "10": dict(question_region="", visual_prompt=[], bbox=[], mask_idx=0),
    }
    root = spar_bench(tmp_path / "set")
    (Path(root) / "sparbench_region_prompts.json").write_text(json.dumps(prompts))
    got = benchmarks.load("spar-bench", root)
    assert [(e.id, e.path) for e in got] == [
        ("10", "lor"),
        ("11", "lor"),
        ("11", "dtr"),
        ("12", "lor"),
        ("13", "lor"),
        ("13", "dtr"),
    ]
    assert got[2].question == two and got[2].regions == [(1, (1, 1, 8, 8)), (0, (9, 9, 20, 20))]
    assert got[5].question == one and got[5].regions == [(0, (1, 2, 30, 40)), (0, (5, 6, 70, 71))]
    assert got[4].question == SPAR[3][2] and not got[4].regions
    # a row without a region prompt is asked in DTR as it is
    asked = evaluation.select(got, "both", None)
    assert [len(e.regions) for e in asked if e.path == "dtr"] == [0, 2, 0, 2]
    prompts["13"]["bbox"][0][2] = 97
    (tmp_path / "other").mkdir()
    root = spar_bench(tmp_path / "other")
    (Path(root) / "sparbench_region_prompts.json").write_text(json.dumps(prompts))
    with pytest.raises(BadRows, match=r":4: regions: outside of image 0: \(1, 2, 97, 40\)"):
        benchmarks.load("spar-bench", root)


def drawn(size, *marks, quality=75) -> bytes:
    """A JPEG of a room with marks as SPAR draws them: discs of radius 20, strokes of 20 that lie
    outside but for 2.5."""
    room, camera, things = furnish(np.random.default_rng(5), size)
    picture = Image.fromarray(render(room, things, camera)[0])
    pen = ImageDraw.Draw(picture)
    for colour, box in marks:
        if len(box) == 2:
            pen.ellipse([box[0] - 20, box[1] - 20, box[0] + 20, box[1] + 20], fill=colour)
        else:
            outside = [box[0] - 17.5, box[1] - 17.5, box[2] + 17.5, box[3] + 17.5]
            pen.rectangle(outside, outline=colour, width=20)
    picture.save(out := io.BytesIO(), "JPEG", quality=quality)
    return out.getvalue()


def test_spar_bench_regions_from_the_marks_in_its_images(tmp_path):
    """Without region prompts: each colour in the view that has it; one that isn't found loses
    all."""
    # cut
    size, red, blue, green = (640, 480), (100, 120, 260, 300), (400, 200), (300, 100, 630, 420)
    reds, blues, greens = ((255, 0, 0), red), ((0, 0, 255), blue), ((0, 255, 0), green)
    both, views = drawn(size, reds, blues), [drawn(size, greens), drawn(size, blues, reds)]
    cases = [
        ("depth_prediction_oo", "From (red bbox) to lamp (blue point), or red bbox?", [both]),
        (
            "spatial_imagination_oo_mv",
            "table (green bbox), (red bbox), (blue point), red bbox",
            views,
        ),
        ("distance_infer_center_oo", "chair (red bbox) or (green bbox)?", [both]),
        ("view_change_infer", "How did the camera move?", views),
    ]
    rows = [
        dict(
            id=k,
            task=task,
            question=question,
            answer="1",
            image=[{"bytes": file, "path": None} for file in files],
        )
        for k, (task, question, files) in enumerate(cases)
    ]
    root = write(tmp_path / "data" / "test-0.parquet", rows, image=pa.list_(IMAGE))
    got = {e.id: e for e in benchmarks.load("spar-bench", root) if e.path == "dtr"}
    assert set(got) == {"0", "1"}
    # as in training
    each = "From (red bbox <mask>) to lamp (blue point <mask>), or red bbox <mask>?"
    # of several views
    first = "table (green bbox <mask>), (red bbox <mask>), (blue point <mask>), red bbox"
    assert (got["0"].question, got["1"].question) == (each, first)
    point = (400 - 16, 200 - 12, 400 + 16, 200 + 12)  # a square of 50/1000 of the image
    wanted = {"0": [(0, red), (0, point), (0, red)], "1": [(0, green), (1, red), (1, point)]}
    for e, want in ((got[name], wanted[name]) for name in got):
        assert [view for view, _ in e.regions] == [view for view, _ in want]
        apart = np.subtract([box for _, box in e.regions], [box for _, box in want])
        assert abs(apart).max() <= 3, apart
    with pytest.warns(UserWarning, match="no region for the marks of 1 rows"):
        assert [len(e.regions) for e in benchmarks.load("spar-bench", root, "dtr")] == [3, 3, 0, 0]
    assert not any(e.regions for e in benchmarks.load("spar-bench", root, "lor"))
    # Marks are searched in the pixels, so a torn image is found, and named by its row.
    rows[0]["image"] = [{"bytes": both[:1500], "path": None}]
    root = write(tmp_path / "torn" / "test-0.parquet", rows, image=pa.list_(IMAGE))
    with pytest.raises(BadRows, match="test-0.parquet.*image: corrupt"):
        benchmarks.load("spar-bench", root, "dtr")
    with pytest.warns(UserWarning, match="no region"):
        left = benchmarks.load("spar-bench", root, "dtr", skip_bad_rows=True)
    assert [e.id for e in left] == ["1", "2", "3"]


def depth_png(values) -> dict:
    Image.fromarray(np.asarray(values, np.uint16)).save(out := io.BytesIO(), "PNG")
    return {"bytes": out.getvalue(), "path": None}


def rgbd(folder: Path, **changes) -> str:
    """SPAR-Bench-RGBD: a depth map and a pose an image, at the sensor's resolution, and two
    cameras."""
    depths = [np.arange(36 * 48).reshape(36, 48) + 1000 * k for k in (1, 2)]
    camera = [1000.0, 0, 648, 0, 0, 1000, 484, 0, 0, 0, 1, 0, 0, 0, 0, 1]  # of 1296 x 968
    row = (
        dict(
            id=1,
            img_type="multi_view",
            format_type="fill",
            task="depth_prediction_oo_mv",
            source="scannet",
            image=[image(0), image(1)],
            question="How deep?",
            answer="1.5",
            depth=[depth_png(depth) for depth in depths],
            pose=[list(np.eye(4).ravel())] * 2,
            intrinsic_color=camera,
            intrinsic_depth=camera,
        )
        | changes
    )
    return write(
        folder / "data" / "test-0.parquet", [row], image=pa.list_(IMAGE), depth=pa.list_(IMAGE)
    )


def test_spar_bench_s_depth(tmp_path):
    (e,) = benchmarks.load("spar-bench", rgbd(tmp_path))
    assert [depth.shape for depth in e.depths] == [(72, 96)] * 2  # its image's size
    for k, depth in enumerate(e.depths):
        metres = np.asarray(depth)
        assert (
            metres.dtype == np.float32
            and metres[::2, ::2].tolist()
            == (
                (np.arange(36 * 48).reshape(36, 48) + 1000 * (k + 1)).astype(np.float32) / 1000
            ).tolist()
        )
    wanted = (1000 * 96 / 1296, 1000 * 72 / 968, 48, 36)
    assert np.allclose(e.intrinsics, [wanted] * 2)
    # of the image itself, one an image
    own = [100.0, 0, 48, 0, 0, 100, 36, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    (e,) = benchmarks.load(
        "spar-bench", rgbd(tmp_path / "own", intrinsic_color=[own, own], source="rxr")
    )
    assert e.intrinsics == [(100, 100, 48, 36)] * 2
    (e,) = benchmarks.load("spar-bench", rgbd(tmp_path / "bare", intrinsic_color=None))
    assert e.depths and e.intrinsics is None
    for change, why in (
        (dict(depth=[depth_png(np.full((9, 9), 3))] * 2), "depth: in metres, not millimetres"),
        (dict(depth=[image(0)] * 2), "depth: wrong mode: RGB"),
        (dict(depth=[depth_png(np.full((9, 9), 3000))]), "depth: 1 for 2 images"),
        (dict(source="rxr"), "intrinsics: not of an image of"),
    ):
        with pytest.raises(BadRows, match=why):
            benchmarks.load("spar-bench", rgbd(tmp_path / "bad", **change))


EMBSPATIAL = dict(
    data_source="mp3d",
    scene_id="YVUC",
    question_id="mp3d_57",
    relation="close",
    answer=2,
    question="Which object is at the shortest distance?",
    answer_options=["door", "cabinet", "table", "cart"],
    objects=[{"name": "door", "bbox": [4, 0, 50, 25]}, {"name": "table", "bbox": [60, 30, 36, 42]}],
)


def test_embspatial(tmp_path):
    """JSON with base64, and the parquet copy. One box leaves its image (below: the official check
    sees x)."""
    text = base64.b64encode(png(0)).decode()
    below = dict(
        EMBSPATIAL, question_id="57", answer=0, objects=[{"name": "door", "bbox": [4, 50, 50, 23]}]
    )
    (tmp_path / "embspatial_bench.json").write_text(
        json.dumps([dict(EMBSPATIAL, image=text), dict(below, image=text, data_source="ai2thor")])
    )
    lor, dtr, outside = benchmarks.load("embspatial", tmp_path)
    options = "\n(A) door\n(B) cabinet\n(C) table\n(D) cart"
    question = f"{EMBSPATIAL['question']} Select from the following choices.{options}"
    assert (lor.path, lor.question, lor.answer, lor.task) == ("lor", question, "C", "close")
    assert (lor.regions, lor.id, dtr.path, dtr.id) == ([], "mp3d_57", "dtr", "mp3d_57")
    assert dtr.question == f"{question}\nRelevant objects: door <mask>, table <mask>."
    assert dtr.regions == [(0, (4, 0, 54, 25)), (0, (60, 30, 96, 72))]
    assert (outside.path, outside.regions, outside.id) == ("lor", [], "ai2thor_57")
    assert pixels(dtr.images[0]) == pixels(PICTURES[0])
    direct = benchmarks.load("embspatial", tmp_path, "direct")[0].question
    assert (
        direct == "Note: You only need to respond with A, B, C, D without providing any additional "
        f"information.\n{EMBSPATIAL['question']}\nA) door\nB) cabinet\nC) table\nD) cart"
    )
    root = write(
        tmp_path / "flageval" / "data" / "test-00000-of-00001.parquet",
        [dict(EMBSPATIAL, image=image(0))],
        image=IMAGE,
    )
    assert [e.regions for e in benchmarks.load("embspatial", root)] == [[], dtr.regions]


def sat_rows(n: int = 6) -> list[dict]:
    return [
        dict(
            image_bytes=[png(k % 4)] * (1 + k % 2),
            question=f"Which way, {k}?",
            answers=["left", " right "],
            correct_answer=("left", "right")[k % 2],
            question_type="ego_movement" if k < 3 else "perspective",
        )
        for k in range(n)
    ]


def test_sat(tmp_path):
    """Raw bytes. Both orders of the options; the first one is drawn from the row's number."""
    write(tmp_path / "SAT_test.parquet", sat_rows(), image_bytes=pa.list_(pa.binary()))
    write(tmp_path / "SAT_train.parquet", sat_rows(2), image_bytes=pa.list_(pa.binary()))
    got = benchmarks.load("sat", tmp_path)
    assert len(got) == 12 and len({e.id for e in got}) == 12
    for k in range(6):
        first, second = got[2 * k : 2 * k + 2]
        assert {first.answer, second.answer} == {"A", "B"} and len(first.images) == 1 + k % 2
        for e in (first, second):
            head, *options = e.question.split("\n")[:1] + e.question.split("\n")[2:]
            assert head == f"Which way, {k}?" and sorted(o[3:] for o in options) == [
                "left",
                "right",
            ]
            assert options["AB".index(e.answer)] == f"{e.answer}. {('left', 'right')[k % 2]}"
    # the first order is not always the same
    assert len({e.question.split("\n")[2] for e in got[::2]}) == 2
    assert [e.question for e in benchmarks.load("sat", tmp_path)] == [e.question for e in got]
    stray = dict(sat_rows(1)[0], correct_answer="left in the first frame")  # on one side alone
    write(tmp_path / "a" / "SAT_test.parquet", [stray], image_bytes=pa.list_(pa.binary()))
    assert [(e.question, e.answer) for e in benchmarks.load("sat", tmp_path / "a")] == [
        (e.question, e.answer) for e in got[:2]
    ]
    rows = [dict(sat_rows(1)[0], correct_answer="up")]
    write(tmp_path / "b" / "SAT_test.parquet", rows, image_bytes=pa.list_(pa.binary()))
    with pytest.raises(BadRows, match=r"SAT_test.parquet:1: correct_answer: 'up' is none of \['"):
        benchmarks.load("sat", tmp_path / "b")


CV = [
    ("2D", "Count", "ADE20K", "B"),
    ("2D", "Relation", "COCO", "A"),
    ("2D", "Count", "COCO", "F"),
    ("3D", "Depth", "Omni3D", "A"),
    ("3D", "Distance", "Omni3D", "B"),
]


def cv_bench(folder: Path) -> str:
    rows = [
        dict(
            idx=k,
            type=half,
            task=task,
            image=image(k % 4),
            question="How many?",
            choices=[str(i) for i in range(6 if answer == "F" else 2)],
            answer=f"({answer})",
            prompt="How many? Select from the following choices.\n(A) 0\n(B) 1",
            filename=f"{k}.png",
            source=source,
            source_dataset=f"{source} val",
            source_filename="x.jpg",
            target_class="chair",
            target_size=1.0,
            bbox=[[0.1, 0.2, 0.3, 0.4]],
        )
        for k, (half, task, source, answer) in enumerate(CV)
    ]
    write(folder / "test_2d.parquet", rows[:3], image=IMAGE)
    write(folder / "test_3d.parquet", rows[3:], image=IMAGE)
    return str(folder)


def test_cv_bench(tmp_path):
    got = benchmarks.load("cv-bench", cv_bench(tmp_path))
    assert [(e.task, e.answer) for e in got] == [(task, answer) for _, task, _, answer in CV]
    assert got[0].question.endswith("(A) 0\n(B) 1") and got[0].id == "ADE20K_0"
    assert benchmarks.load("cv-bench", tmp_path, "direct")[2].question.startswith(
        "Note: You only need to respond with A, B, C, D, E, F without providing"
    )


def test_blink(tmp_path):
    """A folder a task; unused image columns are null; the test split has no answers and is left
    alone."""
    for task, n in (("Relative_Depth", 1), ("Multi-view_Reasoning", 2)):
        row = dict(
            idx=f"val_{task}_1",
            sub_task=task,
            question="Which?",
            prompt="Which?\n(A) left\n(B) right",
            **{f"image_{k}": image(k) if k <= n else None for k in range(1, 4)},
            image_4=None,
            choices=["left", "right"],
            answer="(B)",
            explanation="",
        )
        kinds = dict.fromkeys(("image_1", "image_2", "image_3", "image_4"), IMAGE)
        write(tmp_path / task / "val-00000-of-00001.parquet", [row], **kinds)
        write(
            tmp_path / task / "test-00000-of-00001.parquet", [row | {"answer": "hidden"}], **kinds
        )
    got = benchmarks.load("blink", tmp_path)
    assert [(e.id, e.task, e.answer, len(e.images)) for e in got] == [
        ("val_Multi-view_Reasoning_1", "Multi-view_Reasoning", "B", 2),
        ("val_Relative_Depth_1", "Relative_Depth", "B", 1),
    ]
    assert pixels(got[0].images[1]) == pixels(PICTURES[2])
    assert [e.task for e in benchmarks.load("blink/Relative_Depth", tmp_path)] == ["Relative_Depth"]
    with pytest.raises(ValueError, match="no task 'Depth'"):
        benchmarks.load("blink/Depth", tmp_path)


def test_realworldqa(tmp_path):
    rows = [
        dict(image=image(k), question=f"{k}? Answer directly.", answer=answer)
        for k, answer in enumerate(["A", "2", "Yes"])
    ]
    root = write(tmp_path / "data" / "test-00000-of-00002.parquet", rows, image=IMAGE)
    got = benchmarks.load("realworldqa", root)
    assert [(e.answer, e.question) for e in got] == [
        ("A", "0? Answer directly."),
        ("2", "1? Answer directly."),
        ("Yes", "2? Answer directly."),
    ]
    assert len({e.id for e in got}) == 3


def test_erqa(tmp_path):
    """Images stand where visual_indices puts them, in that order; a repr of a list is one, too."""
    text = "Before. After that. Choices: A. x B. y"
    places = [[8, 0], "[8, 20]", [0, 0], [3], "[]"]
    rows = [
        dict(
            question_id=f"q{k}",
            question=text,
            question_type="Task Reasoning",
            answer="A",
            images=[image(1), image(2)],
            visual_indices=str(p),
        )
        for k, p in enumerate(places)
    ]
    root = write(tmp_path / "data" / "test-00000-of-00001.parquet", rows, images=pa.list_(IMAGE))
    got = benchmarks.load("erqa", root)
    assert got[0].question == "<image>Before. <image>After that. Choices: A. x B. y"
    assert pixels(got[0].images[0]) == pixels(PICTURES[2])  # the one at character 0
    assert got[1].question == "Before. <image>After that. <image>Choices: A. x B. y"
    assert pixels(got[1].images[0]) == pixels(PICTURES[1])
    assert [e.question for e in got[2:]] == [text] * 3
    tsv = tmp_path / "tsv" / "ERQA.tsv"
    tsv.parent.mkdir()
    both = json.dumps([base64.b64encode(png(k)).decode() for k in (1, 2)])
    quoted = both.replace('"', '""')
    tsv.write_text(
        "index\timage\tquestion\tquestion_type\tanswer\n"
        f'3\t"{quoted}"\tFirst <image> then <image>.\tOther\tC\n'
    )
    (listed,) = benchmarks.load("erqa", tsv.parent)
    assert (listed.question, listed.answer, listed.id) == ("First <image> then <image>.", "C", "3")
    (tmp_path / "json" / "pics").mkdir(parents=True)
    for k in (1, 2):
        (tmp_path / "json" / "pics" / f"{k}.png").write_bytes(png(k))
    (tmp_path / "json" / "erqa.json").write_text(
        json.dumps(
            [
                dict(
                    images=["pics/1.png", "pics/2.png"],
                    question=text,
                    question_type="Other",
                    answer="B",
                )
            ]
        )
    )
    (first,) = benchmarks.load("erqa", tmp_path / "json")
    assert pixels(first.images[1]) == pixels(PICTURES[2]) and first.question == text


SRGPT = [
    (
        "qualitative_0",
        "left_predicate",
        "Is Region [1] left of Region [0]?",
        "No, Region [1] is not left.",
    ),
    (
        "qualitative_1",
        "tall_choice",
        "Which is taller, Region [0] or Region [1]?",
        "Region [1] is taller.",
    ),
    ("quantitative_0", "width_data", "How wide is Region [1]?", "Region [1] is 3.28 feet wide."),
    (
        "quantitative_1",
        "horizontal_distance_data",
        "How far is Region [0] from Region [1]?",
        "It is 1.5 meters.",
    ),
    ("quantitative_2", "direction", "Region [0] faces Region [1]?", "Region [1] is at 11 o'clock."),
]


def spatialrgpt(folder: Path) -> str:
    """Nested columns as Python's repr, as the parquet copy has them."""
    rows = [
        dict(
            id=name,
            image_info=str({"file_path": "images/0.png", "height": 72}),
            text_q=text,
            qa_info=str({"type": name.split("_")[0], "category": category}),
            conversations=str(
                [
                    {"from": "human", "value": "<image>\n<mask> <mask>"},
                    {"from": "gpt", "value": answer},
                ]
            ),
            bbox=str([[-3, 2, 30, 40], [50, 10, 99, 70]]),
            rle="[]",
            image=image(0),
        )
        for name, category, text, answer in SRGPT
    ]
    write(folder / "data" / "val-00000-of-00001.parquet", rows, image=IMAGE)
    return str(folder)


def test_spatialrgpt_bench(tmp_path):
    got = benchmarks.load("spatialrgpt-bench", spatialrgpt(tmp_path))
    left, right = (0, (0, 2, 30, 40)), (0, (50, 10, 96, 70))  # clipped, as the set's own code does
    assert got[0].question == "Is Region [1] <mask> left of Region [0] <mask>?" and got[
        0
    ].regions == [
        right,
        left,
    ]
    assert got[2].question == "How wide is Region [1] <mask>?" and got[2].regions == [right]
    assert got[3].answer == "It is 1.5 meters." and got[3].task == "horizontal_distance_data"
    (tmp_path / "json" / "images").mkdir(parents=True)
    (tmp_path / "json" / "images" / "0.png").write_bytes(png(0))
    name, category, text, answer = SRGPT[0]
    row = dict(
        id=name,
        image_info={"file_path": "images/0.png"},
        text_q=text,
        rle=[],
        qa_info={"type": "qualitative", "category": category},
        bbox=[[-3, 2, 30, 40], [50, 10, 99, 70]],
        conversations=[{"from": "human", "value": "q"}, {"from": "gpt", "value": answer}],
    )
    (tmp_path / "json" / "SpatialRGPT-Bench_v1.json").write_text(json.dumps([row]))
    (same,) = benchmarks.load("spatialrgpt-bench", tmp_path / "json")
    assert (same.question, same.regions, same.answer) == (
        got[0].question,
        got[0].regions,
        got[0].answer,
    )
    assert pixels(same.images[0]) == pixels(PICTURES[0])


# ---- What is wrong is said


def test_a_bad_row_is_named(tmp_path):
    rows = [
        dict(id=k, task="position_matching", image=[image(0)], question="?", answer="A")
        for k in range(5)
    ]
    rows[0]["image"] = [{"bytes": b"no picture", "path": None}]
    rows[1]["task"] = "reading"
    rows[2]["answer"] = " "
    rows[3]["question"] = "the <mask>"
    root = write(tmp_path / "data" / "test-0.parquet", rows, image=pa.list_(IMAGE))
    with pytest.raises(BadRows) as bad:
        benchmarks.load("spar-bench", root)
    assert [(Path(file).name, row, field) for file, row, field, _ in bad.value.rows] == [
        ("test-0.parquet", 1, "image"),
        ("test-0.parquet", 2, "task"),
        ("test-0.parquet", 3, "answer"),
        ("test-0.parquet", 4, "question"),
    ]
    del rows[4]["answer"]
    write(tmp_path / "less" / "test-0.parquet", rows[4:], image=pa.list_(IMAGE))
    with pytest.raises(BadRows, match="answer: missing; there are id, task, image, question"):
        benchmarks.load("spar-bench", tmp_path / "less")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "test-0.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(BadRows, match="file: unreadable"):
        benchmarks.load("spar-bench", tmp_path / "torn")
    missing = json.dumps([dict(EMBSPATIAL, image="pictures/1.jpg")])
    (tmp_path / "embspatial_bench.json").write_text(missing)
    with pytest.raises(
        BadRows, match="image: missing file: pictures/1.jpg in .* .--data: where it is"
    ):
        benchmarks.load("embspatial", tmp_path)


def mine(folder: Path, monkeypatch, column: str) -> str:
    """A forker's benchmark: one reader, one entry in the registry."""

    def read(row):
        counts = {"chairs": 2}
        yield Item(
            row.text("id"), row.images("image"), row.text("answer"), "", f"{counts[column]}?"
        )

    entry = Benchmark(
        hub="me/mine",
        rows=2,
        files=("*.jsonl",),
        read=read,
        official=equal,
        aggregate=by_sample,
        others=("a model", "its report", {"overall": 50.0}),
    )
    monkeypatch.setitem(benchmarks.BENCHMARKS, "mine", entry)
    rows = [dict(id=k, image=base64.b64encode(png(k)).decode(), answer="AB"[k]) for k in range(2)]
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_a_benchmark_is_one_reader_and_one_entry(tmp_path, monkeypatch, capsys):
    root = mine(tmp_path / "set", monkeypatch, "chairs")
    got = benchmarks.load("mine", root)
    assert [(e.id, e.question, e.answer) for e in got] == [("0", "2?", "A"), ("1", "2?", "B")]
    scores = benchmarks.score("mine", [(got[0], "A"), (got[1], "no idea at all, sorry")], "robust")
    assert scores == {"overall": 50, "unparsed": 50}
    stand_in(monkeypatch, lambda e: e.answer)
    config = evaluation.Config("m", (root,), benchmark="mine", path="direct", out=str(tmp_path))
    assert evaluation.main(config)["benchmark"]["direct"]["official"]["overall"] == 100
    assert "a model (its report)" in capsys.readouterr().out


def test_a_bug_in_a_reader_keeps_its_traceback(tmp_path, monkeypatch):
    """A typo of its author is no fault of the data; a column that a row lacks is, and is named."""
    root = mine(tmp_path / "set", monkeypatch, "chiars")
    for skip in (False, True):
        with pytest.raises(KeyError, match="chiars"):
            benchmarks.load("mine", root, skip_bad_rows=skip)
    (Path(root) / "rows.jsonl").write_text('{"id": 1, "answer": "A"}\n')
    with pytest.raises(BadRows, match="rows.jsonl:1: image: missing; there are id, answer"):
        benchmarks.load("mine", root)


def test_bad_rows_can_be_left_out_and_are_counted_by_file(tmp_path, capsys):
    rows = [
        dict(
            question_id=f"q{k}",
            question="?",
            question_type="Other",
            answer="A",
            images=[image(0)],
            visual_indices=[0],
        )
        for k in range(4)
    ]
    rows[3]["answer"] = "Z"
    for k in range(2):
        part = rows[2 * k : 2 * k + 2]
        root = write(tmp_path / "data" / f"test-{k}.parquet", part, images=pa.list_(IMAGE))
    with pytest.raises(BadRows, match="test-1.parquet:2: answer: no letter of 8 options: 'Z'"):
        benchmarks.load("erqa", root)
    got = benchmarks.load("erqa", root, skip_bad_rows=True)
    assert [e.id for e in got] == ["q0", "q1", "q2"]
    assert (
        "erqa: left out 1 of 4 rows: 1 x answer: no letter of 8 options" in capsys.readouterr().out
    )
    bad = write(tmp_path / "bad" / "test-0.parquet", rows[3:], images=pa.list_(IMAGE))
    with pytest.raises(BadRows):  # nothing is left
        benchmarks.load("erqa", bad, skip_bad_rows=True)


def test_where_it_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sat: no \*\*/SAT_test\*.parquet or .* in "):
        benchmarks.load("sat", tmp_path)
    with pytest.raises(FileNotFoundError, match="nor a hub id: /no/where/at/all") as error:
        benchmarks.load("sat", "/no/where/at/all")
    assert isinstance(error.value, UserError)
    with pytest.raises(ValueError, match="unknown benchmark 'spa': one of spar-bench, "):
        benchmarks.load("spa")


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch):
    """Only the files that are read, of the set's own repository or of the one that was named."""
    import huggingface_hub

    asked = []
    root = cv_bench(tmp_path)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda hub, **how: asked.append((hub, how)) or root
    )
    assert len(benchmarks.load("cv-bench")) == len(benchmarks.load("cv-bench", "someone/copy")) == 5
    patterns = ["*test_[23]d*.parquet", "*test*.parquet"]
    assert asked == [
        (hub, dict(repo_type="dataset", allow_patterns=patterns))
        for hub in ("nyu-visionx/CV-Bench", "someone/copy")
    ]


def test_another_count_is_a_warning(tmp_path):
    with pytest.warns(
        UserWarning, match=r"cv-bench: 5 rows in .*, 2638 are published \(Count 2, Relation 1, "
    ):
        benchmarks.load("cv-bench", cv_bench(tmp_path))


def test_an_id_that_recurs_gets_its_row(tmp_path):
    rows = [
        dict(
            question_id="7",
            question="?",
            question_type="Other",
            answer="A",
            images=[image(0)],
            visual_indices=[0],
        )
        for _ in range(2)
    ]
    root = write(tmp_path / "data" / "test-0.parquet", rows, images=pa.list_(IMAGE))
    assert [e.id for e in benchmarks.load("erqa", root)] == ["7", "7#2"]


# ---- Scorers


def one(
    name: str, scorer: str, response: str, answer: str, task: str = "", question: str = "?", **more
) -> float:
    """overall of one answer, 0..1; None where it is unparsed."""
    example = Example(
        more.get("id", "x_1"), more.get("path", "direct"), [], question, answer, task=task
    )
    result = benchmarks.score(name, [(example, response)], scorer)
    assert all(0 <= value <= 100 for value in result.values())
    return None if scorer == "robust" and result["unparsed"] else result["overall"] / 100


def spar(scorer, response, answer, task):
    return one("spar-bench", scorer, response, answer, task)


@pytest.mark.parametrize(
    "error, value", [(0, 1), (0.1, 0.9), (0.2, 0.7), (0.25, 0.6), (0.3, 0.5), (0.5, 0.1), (0.51, 0)]
)
def test_mra(error, value):
    assert mra(1 + error, 1.0, 1e-9) == pytest.approx(value)
    if error not in (0.1, 0.2, 0.3):  # ties of floats: below
        assert mra(1 + error, 1.0) == pytest.approx(value)
    assert mra(0.3, 0.0) == pytest.approx(0.5) and mra(0, 0.0) == 1  # absolute


@pytest.mark.parametrize(
    "said, true, official, exact",
    [
        ("0.9", "0.6", 0.0, 0.1),
        ("1.2", "1.5", 0.6, 0.7),
        ("2.1", "1.5", 0.2, 0.3),
        ("0.3", "0.4", 0.5, 0.6),
        ("2.7", "2.0", 0.3, 0.4),
        ("0.8", "1.0", 0.7, 0.7),
        ("1.5", "1.0", 0.1, 0.1),
    ],
)
def test_mra_at_ties_of_floats(said, true, official, exact):
    """Relative errors of exactly 1 - t: numpy's floats, as published, against exact arithmetic."""
    assert spar("official", said, true, "depth_prediction_oc") == pytest.approx(official)
    assert spar("robust", said, true, "depth_prediction_oc") == pytest.approx(exact)


@pytest.mark.parametrize(
    "response, true, task, official, robust",
    [
        # reads 2, a third off; two numbers
        ("Object 2 is 1.5 m", "1.5", "depth_prediction_oc", 0.4, None),
        # several views: the last number
        ("Object 2 is 1.5 m", "1.5", "depth_prediction_oc_mv", 1, None),
        ("-1.5", "1.5", "depth_prediction_oc", 1, 0),  # the sign is dropped
        ("1.5 m", "1.5", "distance_prediction_oo", 1, 1),
        ("150 cm", "1.5", "distance_prediction_oo", 0, 1),
        ("so the answer is 1.5 m, not 3", "1.5", "distance_prediction_oo", 1, 1),
        ("So the answer is **1.5** m, not 3.", "1.5", "distance_prediction_oo", 1, 1),
        ("no idea", "1.5", "depth_prediction_oc", 0, None),
        ("", "1.5", "depth_prediction_oc_mv", 0, None),
        ("<think>2</think><answer>1.5</answer>", "1.5", "depth_prediction_oc", 1, 1),
        ("<answer>about 1.5</answer>", "1.5", "depth_prediction_oc", 1, None),
        ("2^3", "2", "depth_prediction_oc_mv", 1, None),  # not preceded by ^
        # options
        ("", "A", "position_matching", 1, None),  # the empty answer is a substring
        ("<answer></answer>", "A", "position_matching", 1, None),
        ("Answer: B", "A", "position_matching", 1, 0),
        ("b", "B", "position_matching", 1, 1),
        ("(A)", "A", "position_matching", 0, 1),
        (" A", "A", "position_matching", 0, 1),
        ("A. the chair", "A", "position_matching", 1, 1),
        ("A or B", "A", "position_matching", 1, None),
        ("<answer>Answer: A</answer>", "A", "position_matching", 1, None),
        ("The answer is B.", "B", "position_matching", 0, 1),
        ("I first thought the answer is A, but the answer is B", "B", "position_matching", 0, 1),
        ("A chair is nearer", "A", "position_matching", 1, None),  # an article
        ("Both look alike to me.", "B", "position_matching", 1, None),
        (
            "A. It is 2 m away.\nB. It is 1 m away.\nThe answer is B.",
            "B",
            "position_matching",
            0,
            1,
        ),
        ("A) is wrong, since it is far. So the answer is (B).", "B", "position_matching", 0, 1),
        ("A. It is 2 m away.\nB. It is 1 m away.", "B", "position_matching", 0, None),
        ("Option A is correct.", "A", "position_matching", 0, 1),
        ("A is correct", "A", "position_matching", 1, 1),
        ("The correct choice is A because it is nearer", "A", "position_matching", 0, 1),
        ("B is wrong, A is nearer.", "A", "position_matching", 0, None),
        # perhaps an article, beside another letter
        ("A chair is nearer: B", "B", "position_matching", 0, None),
        ("B. A chair", "B", "position_matching", 1, 1),
        ("Answer: b", "B", "position_matching", 0, 1),
        ("the answer is b.", "B", "position_matching", 0, 1),
        ("the answer is a.", "A", "position_matching", 0, 1),
        ("The answer is A or B", "A", "position_matching", 0, None),
        # camera motion: five axes; the three that nobody moves on count
        # divided by the answer
        ("move_right:2", "move_right:1", "view_change_infer", (0.1 + 4) / 5, 4 / 5),
        ("move_right:0.5", "move_right:1", "view_change_infer", 4 / 5, (0.1 + 4) / 5),
        # |0.3 - 0|
        ("move_up:1", "move_right:0.3,move_up:1", "view_change_infer", (0.5 + 4) / 5, 4 / 5),
        (
            "move_right:1,move_left:1",
            "move_right:1",
            "view_change_infer",
            4 / 5,
            4 / 5,
        ),  # |1 - 0| > .5
        ("move_right:1", "move_right:1,rotate_left:30", "view_change_infer", 4 / 5, 4 / 5),
        ("move_left:0.4", "move_right:0.4", "view_change_infer", 4 / 5, 4 / 5),
        ("go right", "move_right:1", "view_change_infer", 0, None),
        (
            "The answer is move_right:0.4,rotate_left:30.",
            "move_right:0.4,rotate_left:30",
            "view_change_infer",
            (0.3 + 4) / 5,
            1,
        ),
        ("move_right:1,sing:2", "move_right:1", "view_change_infer", 1, None),
    ],
)
def test_spar_by_both_scorers(response, true, task, official, robust):
    assert spar("official", response, true, task) == pytest.approx(official)
    got = spar("robust", response, true, task)
    assert got is None if robust is None else got == pytest.approx(robust)


@pytest.mark.parametrize(
    "name, response, answer, official, robust",
    [
        ("embspatial", "It is a table, so C", "C", 0, 1),  # the article is option A
        ("embspatial", "(c)", "C", 1, 1),
        ("embspatial", "cart", "D", 0, 1),  # the option's text
        ("embspatial", "<answer>Cart.</answer>", "D", 0, 1),
        ("embspatial", "<think>A or B</think><answer>D</answer>", "D", 1, 1),
        ("embspatial", "I don't know", "D", 0, None),
        ("embspatial", "A cart, I think", "D", 0, None),
        ("cv-bench", "The answer is B", "B", 0, 1),  # T
        ("cv-bench", "B) cabinet", "B", 1, 1),
        ("cv-bench", " (b)", "B", 1, 1),
        ("cv-bench", "", "B", 0, None),
        ("sat", "(B).", "B", 1, 1),
        ("sat", "B. cabinet", "B", 0, 1),
        ("erqa", " a ", "A", 1, 1),
        ("realworldqa", "Yes.", "yes", 1, 1),
        ("realworldqa", "<think>so</think> <answer>2 </answer>", "2", 1, 1),
        ("realworldqa", "2.0", "2", 0, 1),
        ("realworldqa", "It is 2 or 3", "2", 0, None),
        ("realworldqa", "2.5", "25", 0, 0),  # only the last dots go
        ("realworldqa", "Answer: B", "B", 1, 1),
        ("realworldqa", "The answer is Yes.", "yes", 0, 1),
        ("realworldqa", "**No**", "yes", 0, 0),
        ("realworldqa", "It is hard to say from this picture.", "yes", 0, None),  # prose
        ("realworldqa", "250 cm", "250 cm", 1, 1),
        ("erqa", "The answer is B", "B", 1, 1),
        ("erqa", "A or B", "B", 0, None),
        ("blink", "(B)", "B", 1, 1),
        ("blink", "The answer is (b)", "B", 0, 1),
        ("blink", "Not A. Answer: option (B)", "B", 0, 1),
        ("blink", "the answer is a table", "C", 0, None),
        ("blink", "Option B", "B", 0, 1),
    ],
)
def test_choices_by_both_scorers(name, response, answer, official, robust):
    question = "Which?\n(A) door\n(B) cabinet\n(C) table\n(D) cart"
    assert one(name, "official", response, answer, "t", question) == official
    assert one(name, "robust", response, answer, "t", question) == robust


@pytest.mark.parametrize(
    "response, k, official, robust",
    [
        ("No, it is right of it.", 0, 1, 1),
        ("Yes.", 0, 0, 0),
        ("Left.", 0, 0, None),
        ("It isn't; yes?", 0, 1, None),
        ("It isn’t.", 0, 1, 1),
        ("Correct", 0, 0, 0),
        ("In fact, Region [1] is right of it.", 0, 1, 1),
        ("Actually, yes", 0, 0, 0),
        ("10 o’clock", 4, 1, 1),
        ("Region 1", 1, 1, 1),
        ("<answer>1</answer>", 1, 0, 1),
        ("Region [0] is smaller than region [1]", 1, 0, None),
        ("1,200 m", 3, 0, None),
        ("5 foot", 3, 1, 1),
        ("1 meter", 2, 1, 1),
        ("about 130 cm", 2, 0, 0),
        ("75 cm", 2, 1, 1),
        ("74 cm", 2, 0, 0),
        ("39.37 inches", 2, 1, 1),
        ("It is 1 m, or 4 ft", 2, 1, None),
        ("big", 2, 0, None),
        ("1.0", 2, 0, 1),
        ("2 feet away, 5 meters", 3, 0, None),
        ("1.2 meters", 3, 1, 1),
        ("12 o'clock", 4, 1, 1),
        ("1 o'clock", 4, 0, 0),
        ("10 o'clock", 4, 1, 1),
    ],
)
def test_spatialrgpt_without_a_judge(response, k, official, robust):
    _, category, question, answer = SRGPT[k]
    for scorer, value in (("official", official), ("robust", robust)):
        assert one("spatialrgpt-bench", scorer, response, answer, category, question) == value


def test_a_truth_without_a_length_earns_nothing():
    truth = "Region [0] directly supports Region [1], with no vertical distance between them."
    for scorer in ("official", "robust"):
        assert one("spatialrgpt-bench", scorer, "1 meter", truth, "vertical_distance_data") == 0
        assert (
            one("spatialrgpt-bench", scorer, "Yes", "Region [0] is behind it.", "behind_predicate")
            == 1
        )


@pytest.mark.parametrize(
    "truth, yes",
    [
        ("Yes, Region [0] is above Region [1].", True),
        ("Indeed, Region [0] has a lesser height.", True),
        ("Correct, Region [0] is not as tall as Region [1].", True),
        ("That is False.", False),
        ("No.", False),
        ("Incorrect, Region [0] is not larger than Region [1].", False),
        ("In fact, Region [0] is to the right of Region [1].", False),
        ("Actually, Region [0] might be smaller than Region [1].", False),
    ],
)
def test_the_polarity_of_spatialrgpt_s_truths(truth, yes):
    """All the forms in which the set says yes and no."""
    for said in (True, False):
        got = one("spatialrgpt-bench", "official", "Yes" if said else "No", truth, "left_predicate")
        assert got == float(said == yes)


def test_a_number_is_read_in_the_unit_that_is_asked_for():
    assert (
        read_number("2.5 m", "How far, in centimeters?") == pytest.approx(250)
        and read_number("250", "in cm?") == 250
    )
    assert read_number("2.5 m", "How many centimeters?") == pytest.approx(250)
    assert read_number("30 inches", "How wide?") == pytest.approx(0.762)
    for said, asked in (
        ("250", "cm"),
        ("250 cm", "cm"),
        ("2.5 m", "cm"),
        ("250 cm", "m"),
        ("2.5", "m"),
    ):
        question = f"How far is it, in {asked}?"
        assert one("realworldqa", "robust", said, "250 cm", question=question) == 1, (said, asked)
    assert (
        read_number("It is -1.5 m.", "?") == -1.5
        and read_number("1,200", "?") is None
        and read_number("nan", "?") is None
    )


def test_options_of_one_line():
    question = (
        "Which way? Choices: A. left B. right C. up D. down. Please answer directly with the "
    )
    question += "letter."
    for text, letter in zip(["left", "right", "up", "down"], "ABCD", strict=True):
        assert one("erqa", "robust", f"<answer>{text}</answer>", letter, question=question) == 1
        assert one("erqa", "robust", f"<answer>{text}</answer>", "H", question=question) == 0


# ---- Aggregates


def rows(name, *lines) -> list:
    """(task, id, truth A, said A?)"""
    return [
        (Example(key, "direct", [], "?", "A", task=task), "A" if right else "B")
        for task, key, right in lines
    ]


def test_spar_aggregates():
    """Means of tasks, as published, and of samples, as SR-REAL has it: 3 of 4 and 0 of 1 in
    High."""
    pairs = rows(
        "spar-bench",
        *(("distance_infer_center_oo", str(k), k < 3) for k in range(4)),
        ("spatial_imagination_oo_mv", "4", 0),
        ("position_matching", "5", 1),
    )
    pairs.append((Example("6", "direct", [], "?", "2.0", task="depth_prediction_oo_mv"), "2.2"))
    got = benchmarks.score("spar-bench", pairs, "official")
    assert got["overall"] == pytest.approx((75 + 0 + 100 + 90) / 4)
    assert (got["High"], got["Middle"], got["Low"]) == (37.5, 100, pytest.approx(90))
    assert got["overall_samples"] == pytest.approx((3 + 0 + 1 + 0.9) / 7 * 100)
    assert got["High_samples"] == pytest.approx(60) and got["distance_infer_center_oo"] == 75
    assert (got["single_select"], got["multi_select"]) == (75, 50) and got[
        "multi_fill"
    ] == pytest.approx(90)
    assert "single_fill" not in got and got["unparsed"] == 0


def test_errors_of_spatialrgpt_s_lengths_and_directions():
    """|p - g| / g and 30 degrees an hour, over what is read."""
    cases = [
        ("distance_data", "It is 2 m.", "1 m"),
        ("distance_data", "It is 2 m.", "2 m"),
        ("distance_data", "It is 2 m.", "far"),
        ("distance_data", "On it.", "1 m"),
        ("direction", "1 o'clock", "<answer>11 o'clock</answer>"),
        ("above_predicate", "Yes", "No"),
    ]
    pairs = [
        (Example("x", "direct", [], "?", truth, task=task), said) for task, truth, said in cases
    ]
    assert benchmarks.BENCHMARKS["spatialrgpt-bench"].errors(pairs) == {
        "direct": 0.25,
        "direction": 60,
    }


def test_cv_bench_aggregates():
    pairs = rows(
        "cv-bench",
        ("Count", "ADE20K_0", 1),
        ("Count", "COCO_1", 0),
        ("Relation", "COCO_2", 1),
        ("Depth", "Omni3D_3", 1),
        ("Distance", "Omni3D_4", 0),
        ("Distance", "Omni3D_5", 0),
    )
    got = benchmarks.score("cv-bench", pairs, "robust")
    assert (got["ADE20K"], got["COCO"], got["2D"]) == (100, 50, 75) and got["3D"] == pytest.approx(
        100 / 3
    )
    assert got["overall"] == pytest.approx((75 + 100 / 3) / 2) and got["overall_samples"] == 50
    assert (got["Count"], got["Relation"], got["Depth"], got["Distance"]) == (50, 100, 100, 0)


def test_other_aggregates():
    pairs = rows(
        "blink", ("Counting", "1", 1), ("Jigsaw", "2", 0), ("Jigsaw", "3", 0), ("Jigsaw", "4", 1)
    )
    got = benchmarks.score("blink", pairs, "official")
    assert got["overall"] == pytest.approx((100 + 100 / 3) / 2) and got["overall_samples"] == 50
    pairs = rows(
        "sat",
        ("ego_movement", "sat_1-0", 1),
        ("ego_movement", "sat_1-1", 0),
        ("perspective", "sat_2-0", 1),
        ("perspective", "sat_2-1", 1),
    )
    got = benchmarks.score("sat", pairs, "official")
    assert (got["overall"], got["circular"], got["ego_movement"], got["perspective"]) == (
        75,
        50,
        50,
        100,
    )
    pairs = rows(
        "embspatial", ("close", "mp3d_1", 1), ("far", "mp3d_2", 0), ("far", "scannet_1", 1)
    )
    got = benchmarks.score("embspatial", pairs, "official")
    assert (got["close"], got["far"], got["mp3d"], got["scannet"]) == (100, 50, 50, 100)
    pairs = [
        (Example(name, "direct", [], text, answer, task=task), answer)
        for name, task, text, answer in SRGPT
    ]
    pairs[3] = (pairs[3][0], "no idea")
    got = benchmarks.score("spatialrgpt-bench", pairs, "robust")
    assert (
        got["qualitative"] == 100
        and got["quantitative"] == pytest.approx(200 / 3)
        and got["overall"] == 80
    )
    assert got["horizontal"] == 0 and got["direction"] == got["width"] == got["tall/short"] == 100
    assert got["unparsed"] == 20
    yes = [("above_predicate", "1", 1), ("above_predicate", "2", 1), ("left_predicate", "3", 0)]
    pairs = [
        (Example(key, "direct", [], "?", "Yes", task=task), "Yes" if right else "No")
        for task, key, right in yes
    ]
    got = benchmarks.score("spatialrgpt-bench", pairs, "official")  # the set's script counts rows
    assert got["qualitative"] == pytest.approx(200 / 3) and got["qualitative_columns"] == 50
    for bad in (("spar", pairs, "robust"), ("sat", pairs, "strict"), ("sat", [], "robust")):
        with pytest.raises(ValueError, match="wanted one of spar-bench, "):
            benchmarks.score(*bad)


@pytest.mark.parametrize(
    "said, iou",
    [
        ('{"bbox_2d": [10, 20, 30, 40]}', 1),
        ("<|box_start|>(10,20),(30,40)<|box_end|>", 1),
        ("10 20 30 40", 1),
        ('```json\n[{"bbox_2d": [20, 20, 40, 40], "label": "x"}]```', 1 / 3),
        ("[10, 20, 20, 30]", 1 / 4),
        ("[10.0, 20.0, 30.0, 30.0]", 1 / 2),
        ("[30, 20, 50, 40]", 0),
        ("[30, 40, 10, 20]", 0),
        ("[1, 2, 3]", 0),
        ("[10, 20, 30, 40, 50]", 0),
        ("[-10, 20, 30, 40]", 0),
        ("", 0),
        (None, 0),
    ],
)
def test_boxes_in_every_family_s_form(said, iou):
    assert box_iou(said, '{"bbox_2d": [10, 20, 30, 40]}') == pytest.approx(iou)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_eval_measures_2d_boxes(tmp_path, monkeypatch, capsys, family):
    """A model that writes the left half of the true box, in its family's own units; and one
    question of another kind, which has no IoU."""
    from model.processor import Processor

    PICTURES[0].save(tmp_path / "0.png")
    row = dict(answer=["the chair"], bbox=[10, 10, 40, 30], file_name="0.png")
    rows = [row | {"question_id": k} for k in (1, 2)]
    (tmp_path / "refs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A room."}]
    (tmp_path / "chat.json").write_text(json.dumps([{"image": "0.png", "conversations": chat}]))
    tiny.write(family, tmp_path / "tiny")
    processor = Processor.from_pretrained(tmp_path / "tiny")

    def half(e):
        true = e.answer.replace("50.00,", "30.00,") if e.id.endswith("#1/0") else "no box"
        return processor.decode(processor.target_ids(replace(e, answer=true)))

    stand_in(monkeypatch, half)
    monkeypatch.setattr(run, "load_processor", lambda *args: processor)
    sources = (f"refcoco:{tmp_path}/refs.jsonl", f"llava:{tmp_path}/chat.json")
    config = evaluation.Config("m", sources, path="direct", out=str(tmp_path / "out"))
    found = evaluation.main(config)["results"]["direct"]["refcoco"]
    assert found["iou"]["value"] == pytest.approx(0.25, abs=0.02) and found["iou50"]["n"] == 2
    rows = [
        json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    ]
    assert sorted(row["iou"] is None for row in rows) == [False, False, True]
    assert "2D IoU" in capsys.readouterr().out
    evaluation.main(replace(config, data=sources[1:], out=str(tmp_path / "chat")))
    assert "2D IoU" not in capsys.readouterr().out


# ---- eval.py --benchmark


def test_eval_prints_both_scorers(tmp_path, monkeypatch, capsys):
    """A model that says the right letter behind words: robust sees it. Judges, others' figures are
    named."""
    stand_in(
        monkeypatch,
        lambda e: (
            f"The answer is {e.answer}"
            if e.path == "direct"
            else f"<think>so</think><answer>{e.answer}</answer>"
        ),
    )
    # Others' figures stand beside a complete set only.
    cv = benchmarks.BENCHMARKS["cv-bench"]
    monkeypatch.setitem(benchmarks.BENCHMARKS, "cv-bench", replace(cv, rows=len(CV)))
    config = evaluation.Config(
        "m",
        (cv_bench(tmp_path / "set"),),
        benchmark="cv-bench",
        path="direct",
        out=str(tmp_path / "out"),
    )
    scores = evaluation.main(config)["benchmark"]["direct"]
    assert scores["official"]["overall"] == 0 and scores["robust"]["overall"] == 100
    rows = [
        json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    ]
    assert rows and all((row["official"], row["robust"]) == (0, 100) for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert "SpatialThinker" in next(line for line in lines if line.startswith("cv-bench direct"))
    assert next(line for line in lines if line.startswith("  overall ")).split()[1:] == [
        "0.0±0.0",
        "100.0±0.0",
        "68.6",
    ]
    config = evaluation.Config(
        "m",
        (spatialrgpt(tmp_path / "srgpt"),),
        benchmark="spatialrgpt-bench",
        out=str(tmp_path / "out2"),
    )
    assert set(evaluation.main(config)["benchmark"]) == {"lor", "dtr"}
    table = capsys.readouterr().out
    assert "GPT-4 as a judge" in table and table.count("(5 of 5 questions had regions)") == 1
    assert table.count("  width off / truth ") == table.count("  direction off, degrees ") == 2
    part = evaluation.Config(
        "m",
        (cv_bench(tmp_path / "set"),),
        benchmark="cv-bench",
        path="both",
        out=str(tmp_path / "out3"),
        limit=2,
    )
    evaluation.main(part)
    count = dict(benchmark="cv-bench/Count", limit=None, out=str(tmp_path / "count"))
    evaluation.main(replace(part, **count))
    table = capsys.readouterr().out  # of a part, no figure that somebody else has for the whole
    assert "SpatialThinker" not in table and "68.6" not in table and "cv-bench/Count lor" in table
    assert "(0 of 2 questions had regions)" in table
    with pytest.raises(UserError, match="--data a b: a benchmark lies in one place"):
        evaluation.main(evaluation.Config("m", ("a", "b"), benchmark="cv-bench"))
    rows = [
        json.loads(line)
        for line in (tmp_path / "out2" / "predictions.jsonl").read_text().splitlines()
    ]
    assert len({row["cluster"] for row in rows}) == 1 and rows[0]["cluster"].startswith("sha1 ")
    (tmp_path / "set" / "test_3d.parquet").write_bytes(b"torn")
    with pytest.raises(UserError, match="a benchmark is read whole"):
        evaluation.main(
            evaluation.Config("m", config.data[:0] + (str(tmp_path / "set"),), benchmark="cv-bench")
        )
    rest = dict(limit=None, skip_bad_rows=True, path="lor", out=str(tmp_path / "rest"))
    summary = evaluation.main(replace(part, **rest))
    assert summary["results"]["lor"]["all"]["n"] == 3


def test_an_interrupted_eval_goes_on(tmp_path, monkeypatch):
    """Killed within a chunk (a torn line), it asks the rest; the files are those of the eval that
    never stopped. Of a finished one the table is printed again; other settings are refused."""
    asked, limit = [], [10**9]

    def write_answer(e):
        if len(asked) == limit[0]:
            raise RuntimeError("killed")
        asked.append(e.id)
        return f"<think>x</think><answer>{e.answer}</answer>"

    stand_in(monkeypatch, write_answer)
    monkeypatch.setattr(evaluation, "CHUNK", 2)
    write(tmp_path / "set" / "SAT_test.parquet", sat_rows(), image_bytes=pa.list_(pa.binary()))
    config = evaluation.Config(
        "m", (str(tmp_path / "set"),), benchmark="sat", path="lor", out=str(tmp_path / "a")
    )
    evaluation.main(config)
    whole = (tmp_path / "a" / "predictions.jsonl").read_text()
    assert len(asked) == 12
    asked.clear()
    limit[0] = 7
    config = replace(config, out=str(tmp_path / "b"))
    with pytest.raises(RuntimeError):
        evaluation.main(config)
    file = tmp_path / "b" / "predictions.jsonl"
    assert (
        len(file.read_text().splitlines()) == 6 and not (tmp_path / "b" / "summary.json").exists()
    )
    file.write_text(file.read_text()[:-40])  # torn
    asked.clear()
    limit[0] = 10**9
    evaluation.main(config)
    assert len(asked) == 7 and file.read_text() == whole
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in "ab"]
    assert summaries[0]["results"] == summaries[1]["results"]
    assert summaries[0]["benchmark"] == summaries[1]["benchmark"]
    lines = file.read_text().splitlines(keepends=True)  # two ranks, killed
    file.write_text("".join(lines[:5]))
    (tmp_path / "b" / "predictions.jsonl.1").write_text("".join(lines[6:10]))
    asked.clear()
    evaluation.main(config)
    assert len(asked) == 3 and file.read_text() == whole
    asked.clear()
    again = evaluation.main(replace(config, workers=0))  # a finished one
    assert not asked and again["results"] == summaries[0]["results"] and file.read_text() == whole
    for change, words in (
        (dict(max_new_tokens=7), "--max-new-tokens 1024, now it is 7"),
        (dict(model="n"), "--model m, now it is n"),
        (dict(path="dtr"), "--path lor, now it is dtr"),
        (dict(temperature=1.0, seed=2), "--temperature 0.0, now it is 1.0; --seed 0, now it is 2"),
    ):
        with pytest.raises(UserError, match=words):
            evaluation.main(replace(config, **change))
    # begun by a version with fewer columns: its rows won't do
    settings = json.loads((tmp_path / "b" / "settings.json").read_text())
    (tmp_path / "b" / "settings.json").write_text(json.dumps(settings | {"columns": ["accuracy"]}))
    with pytest.raises(UserError, match="another version has measured them; choose another --out"):
        evaluation.main(config)
    (tmp_path / "b" / "settings.json").unlink()
    with pytest.raises(UserError, match="no settings.json"):
        evaluation.main(config)
    assert not asked and file.read_text() == whole


def test_ranks_give_the_numbers_of_one(tmp_path, monkeypatch):
    """The real model, greedy, in fp32: two ranks by torchrun against one process, with depth-free
    regions."""
    torch.set_num_threads(1)  # as the ranks have: another number adds in another order
    model, outs = tmp_path / "model", [tmp_path / f"out{n}" for n in (1, 2)]
    tiny.write("qwen3_vl", model)
    root = spatialrgpt(tmp_path / "set")
    config = evaluation.Config(
        str(model), (root,), benchmark="spatialrgpt-bench", max_new_tokens=8, out=str(outs[0])
    )
    evaluation.main(config)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command += ["eval.py", "--model", model, "--data", root, "--benchmark", "spatialrgpt-bench"]
    run = subprocess.run(
        [*map(str, command), "--max-new-tokens", "8", "--out", str(outs[1])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("spatialrgpt-bench lor") == 1  # one rank prints
    texts = ((out / "predictions.jsonl").read_text() for out in outs)
    one, two = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert len(one) == 10 and [(row["id"], row["text"]) for row in one] == [
        (row["id"], row["text"]) for row in two
    ]
    one, two = (json.loads((out / "summary.json").read_text()) for out in outs)
    assert one["benchmark"] == two["benchmark"] and one["results"] == two["results"]
    left = {"predictions.jsonl", "settings.json", "summary.json"}
    assert {file.name for file in outs[1].iterdir()} == left
