"""From the public sets to a benchmark table: docs/data.md's four commands, as they stand there, on a
rendered room in the published schemas (SPAR-7M-RGBD, EmbodiedScan, SPAR-Bench) and a tiny random
checkpoint."""

import io
import json
import math
import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import rooms
import warm
from commands import ROOT
from published import IMAGE, embodiedscan, parquet, scan

import data
import train_rl
import train_sft
from data.sets.spar_marks import draw_marks
from model import tiny
from srreal import score, target

HEADING = "## From the public sets to a benchmark table"
PROGRAMS = ["data.coldstart", "train_sft.py", "train_rl.py", "eval.py"]
FEWER = {
    "train_sft.py": "--steps 2 --batch 2",
    "eval.py": "--max-new-tokens 8",
    "train_rl.py": "--steps 1 --prompts 2 --group 2 --max-new-tokens 8",
}
MARKED = {
    "depth_prediction_oc",
    "distance_prediction_oo",
    "distance_prediction_oo_mv",
    "distance_infer_center_oo",
}
# ScanNet's cameras are of 1296 x 968
SENSOR = np.array([[1296 / rooms.SIZE[0]], [968 / rooms.SIZE[1]], [1]])


def commands() -> list[str]:
    """The lines of the section's first block of code."""
    section = (ROOT / "docs" / "data.md").read_text().split(HEADING)[1]
    return section.split("```")[1].strip().splitlines()


def marks(room, things, view=0) -> dict:
    """A red and a blue box (of two things) or a red point (of one), as SPAR's rows have them."""
    if len(things) == 1:
        return {
            "red_point": [
                [round(float(v)) for v in room.pixel(things[0], view) / rooms.SIZE * 1000]
            ]
        }
    boxes = [[round(float(v)) for v in room.box(thing, view)] for thing in things]
    return {f"{colour}_bbox": [box] for colour, box in zip(("red", "blue"), boxes, strict=True)}


def asked(room, a, b) -> list[tuple]:
    """(task, format, question, answer, things, views)."""
    near, far = np.linalg.norm(room.centre(a, 0) - room.centre(b, 0)), room.centre(a, 0)[2]
    apart = "How far are the thing (red bbox) and the other (blue bbox) apart, in meters?"
    return [
        (
            "depth_prediction_oc",
            "fill",
            "What is the depth of the thing (red point)?",
            f"{far:.1f}",
            [a],
            1,
        ),
        ("distance_prediction_oo", "fill", apart, f"{near:.1f}", [a, b], 1),
        ("distance_prediction_oo_mv", "fill", apart, f"{near:.1f}", [a, b], 2),
        (
            "distance_infer_center_oo",
            "select",
            "Which is nearer to the observer?\nA. (red bbox)\nB. (blue bbox)",
            "AB"[int(room.centre(b, 0)[2] < far)],
            [a, b],
            1,
        ),
        (
            "view_change_infer",
            "fill",
            "How did the camera move?",
            "move_right:0.2,rotate_left:4",
            [],
            2,
        ),
    ]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    room, (a, b, *_) = rooms.rich(2, 4)
    spar = folder / "SPAR-7M-RGBD"
    images, depths = rooms.spar_images(room, spar, scan())
    camera = np.eye(4)
    camera[:3, :3] = rooms.matrix(room.cameras[0]) * SENSOR
    np.savetxt(
        spar / "spar/scannet/images" / rooms.SCENE / "intrinsic" / "intrinsic_color.txt", camera
    )
    embodiedscan(spar / "embodiedscan_infos_train.pkl", room, cam2img=camera)
    benchmark = []
    for k, (task, form, question, answer, things, views) in enumerate(asked(room, a, b)):
        drawn, index = marks(room, things) if things else {}, [[0] * len(things)]
        fields = drawn | ({"bbox_img_idx": index} if views > 1 and things else {})
        row = rooms.spar_row(
            task, images[:views], question, answer, depth=list(depths[:views]), **fields
        )
        rooms.spar_file(spar, task, [row], form)
        pictures = [image.copy() for image in room.images[:views]]
        draw_marks(pictures[0], tuple((*name.split("_"), at) for name, (at,) in drawn.items()))
        benchmark.append(
            dict(
                id=k,
                img_type="multi_view" if views > 1 else "single_view",
                format_type=form,
                task=task,
                source="scannet",
                image=[{"bytes": png(picture), "path": None} for picture in pictures],
                question=question,
                answer=answer,
            )
        )
    parquet(
        folder / "SPAR-Bench" / "data" / "test-00000-of-00004.parquet",
        benchmark,
        image=pa.list_(IMAGE),
    )
    tiny.write("qwen2_5_vl", folder / "tiny")
    return folder


def png(picture) -> bytes:
    picture.save(out := io.BytesIO(), "PNG")
    return out.getvalue()


def test_the_commands_name_what_the_ones_before_them_wrote():
    """Where nothing is said of steps, the defaults' last checkpoint is the next command's
    --model."""
    lines = commands()
    assert [next(p for p in PROGRAMS if p in line) for line in lines] == PROGRAMS
    assert (
        f"--model out/sft/step-{train_sft.Config.steps:06d} " in lines[2]
        and "--steps" not in lines[1]
    )
    assert (
        f"--model out/rl/step-{train_rl.Config.steps:06d} " in lines[3]
        and "--steps" not in lines[2]
    )


def typed(line: str, sets: Path) -> list[str]:
    """The words of a command: paths are the fixture's, ranks one, steps few."""
    line = line.replace("/sets/", f"{sets}/").replace("Qwen/Qwen2.5-VL-3B-Instruct", f"{sets}/tiny")
    line = line.replace("out/sft/step-001000", "out/sft/step-000002").replace(
        "out/rl/step-000100", "out/rl/step-000001"
    )
    line = line.replace("--nproc_per_node 8", "--standalone --nproc_per_node 1")
    words = shlex.split(
        f"{line} {next((more for name, more in FEWER.items() if name in line), '')}"
    )
    program = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[words[0]]
    scripts = (str(ROOT / word) if word in PROGRAMS[1:] else word for word in words[1:])
    return [warm.python(), *program, *scripts]


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_from_the_public_sets_to_a_benchmark_table(sets, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    printed = []
    for line in commands():
        run = subprocess.run(
            typed(line, sets), cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, (line, run.stdout[-2000:], run.stderr[-3000:])
        printed.append(run.stdout)
    cold, _, _, table = printed

    # Cold start: every marked row has its truth from EmbodiedScan; each rationale follows from it.
    assert "4 rows with DTR truth" in cold
    learnt = data.load([tmp_path / "out/cold"])
    assert {(e.task, e.path) for e in learnt} == {
        (task, path) for task in MARKED for path in ("lor", "dtr")
    }
    assert all(math.isclose(score(target(e), e).total, 1) for e in learnt)
    assert all(e.depths and e.intrinsics and e.regions for e in learnt)

    # Both trainings took their steps on these rows, and left a checkpoint that the next command
    # read.
    losses = [row["loss"] for row in lines_of(tmp_path / "out/sft/metrics.jsonl")]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    (step,) = lines_of(tmp_path / "out/rl/metrics.jsonl")
    assert 0 <= step["reward"] <= 1 and (tmp_path / "out/rl/step-000001/model.safetensors").exists()

    # The table: every row of the benchmark on both paths, by both scorers, beside the published
    # figures.
    answers = lines_of(tmp_path / "out/spar/predictions.jsonl")
    wanted = {(str(k), path) for k in range(5) for path in ("lor", "dtr")}
    assert {(row["id"], row["path"]) for row in answers} == wanted and len(answers) == len(wanted)
    marks = json.loads((tmp_path / "out/spar/summary.json").read_text())["benchmark"]
    for path in ("lor", "dtr"):
        assert set(marks[path]) == {"official", "robust"}
        # Of 7,211 rows there are five: no published figure stands beside them.
        assert re.search(rf"spar-bench {path} +official +robust\n", table)
        assert MARKED | {"overall", "overall_samples", "Low", "Middle", "High"} <= set(
            marks[path]["robust"]
        )
    assert re.search(r"^  overall +[0-9.]+±[0-9.]+ +[0-9.]+±[0-9.]+$", table, re.M)
    assert "incomplete: 5 of 7,211 rows" in table and "33.1" not in table
