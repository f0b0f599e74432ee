"""The benchmarks of the field's common table, in the schemas in which they are published; a stand-in
for av, whose videos are a number of frames."""

import csv
import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pyarrow as pa
from PIL import Image
from published import IMAGE
from published import parquet as write_parquet


def png(colour=(90, 120, 60), size=(32, 24)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def image(k: int) -> dict:
    return {"bytes": png((40 * k, 90, 60)), "path": f"{k}.png"}


def picture(path: Path, k: int = 0, size=(32, 24)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png((40 * k, 90, 60), size))


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tsv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


# ---- Videos


def frames(folder: Path, count: int, size=(32, 24)) -> None:
    """A folder of numbered frames, whose red tells which it is; not in order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        Image.new("RGB", size, (k, 0, 0)).save(folder / f"{k}.png")


class Unreadable(ValueError):
    pass


def stand_in_av(monkeypatch, promised: int | None = None) -> list[str]:
    """Put a module av in place whose videos are text files that hold their number of frames.

    promised: what their headers say. Returns the list of videos that were decoded.
    """
    decoded = []

    class Container:
        def __init__(self, path):
            self.path = path
            try:
                self.count = int(Path(path).read_text())
            except ValueError as error:
                raise Unreadable("Invalid data found") from error
            context = SimpleNamespace(width=64, height=48)
            stream = SimpleNamespace(
                frames=self.count if promised is None else promised,
                codec_context=context,
                thread_type="NONE",
            )
            self.streams = SimpleNamespace(video=[stream])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def demux(self, stream):
            # Behind the last packet one without content flushes the decoder.
            return [SimpleNamespace(size=9)] * self.count + [SimpleNamespace(size=0)]

        def decode(self, stream):
            decoded.append(self.path)
            for k in range(self.count):
                yield SimpleNamespace(to_image=lambda k=k: Image.new("RGB", (64, 48), (k, 0, 0)))

    module = ModuleType("av")
    module.open = Container
    monkeypatch.setitem(sys.modules, "av", module)
    return decoded


# ---- VSI-Bench

CHAIRS = "How many chair(s) are in this room?"
NEAR = "Which is closest to the door?"
DOORS = ["A. sofa", "B. table", "C. lamp", "D. bed"]
# id, dataset, scene, type, question, options, truth, pruned
VSI = [
    (0, "scannet", "scene0011_00", "object_counting", CHAIRS, None, "4", False),
    (1, "scannet", "scene0011_00", "object_rel_distance", NEAR, DOORS, "B", True),
    (2, "arkitscenes", "41069021", "room_size_estimation", "What size?", None, "25.5", False),
    (3, "arkitscenes", "41069021", "object_rel_direction_easy", "Left?", DOORS[:2], "A", True),
    (4, "scannetpp", "0a5c013435", "object_rel_direction_hard", "Where?", DOORS, "D", False),
    (5, "scannetpp", "0a5c013435", "route_planning", "Fill in: turn ...", DOORS[:3], "C", False),
]
VSI_TYPES = {"options": pa.list_(pa.string())}


def vsi_rows(**without) -> list[dict]:
    rows = []
    for number, dataset, scene, kind, question, options, truth, pruned in VSI:
        row = dict(
            id=number,
            dataset=dataset,
            scene_name=scene,
            question_type=kind,
            question=question,
            options=options,
            ground_truth=truth,
            pruned=pruned,
        )
        rows.append({name: value for name, value in row.items() if name not in without})
    return rows


def vsi_videos(folder: Path, count: int = 5, size=(32, 24)) -> None:
    for dataset, scene in {(row[1], row[2]) for row in VSI}:
        frames(folder / dataset / scene, count, size)


def vsi_bench(folder: Path, count: int = 5, size=(32, 24)) -> str:
    """Today's release: the two halves as parquet, each scene's frames in its video's place."""
    vsi_videos(folder, count, size)
    rows = vsi_rows()
    kept = [row for row in rows if not row["pruned"]]
    pruned = [row for row in rows if row["pruned"]]
    write_parquet(folder / "test_debiased.parquet", kept, **VSI_TYPES)
    write_parquet(folder / "test_pruned.parquet", pruned, **VSI_TYPES)
    return str(folder)


# ---- MMSI-Bench

MMSI = [
    (
        "Which way is the door? Options: A: Left, B: It is behind, at 3:00, C: Right, D: Front",
        "Positional Relationship (Cam.–Obj.)",
        "B",
        2,
    ),
    ("Who moves? Options: A: The cup, B: Me, C: Both, D: None", "Motion (Obj.)", "A", 3),
]


def mmsi(folder: Path) -> str:
    rows = []
    for k, (question, kind, answer, count) in enumerate(MMSI):
        rows.append(
            dict(
                id=k,
                images=[image(j + 3 * k)["bytes"] for j in range(count)],
                question_type=kind,
                question=question,
                answer=answer,
                thought="never shown",
            )
        )
    write_parquet(folder / "MMSI_Bench.parquet", rows, images=pa.list_(pa.binary()))
    return str(folder)


# ---- MindCube-Tiny

MINDCUBE = [
    ("among_group001_q1_2", "Where is the cup? A. Above B. Under C. Front D. Behind", "C"),
    ("aroundnew_6f_q3", "How did I turn? A. Left B. Right", "A"),
    ("rotation_group7_1", "What is behind me? A. Door B. Sofa C. Bed", "B"),
]


def mindcube(folder: Path) -> str:
    """The zip as unpacked: rows in data/raw, paths relative to data/."""
    rows = []
    for name, question, answer in MINDCUBE:
        scene = f"other_all_image/{name.partition('_')[0]}/scene1"
        for view in ("front", "left"):
            picture(folder / "data" / scene / f"{view}.png", len(rows))
        rows.append(
            dict(
                id=name,
                category=["x"],
                type="t",
                meta_info=[["a", "b"]],
                question=question,
                images=[f"{scene}/front.png", f"{scene}/left.png"],
                gt_answer=answer,
            )
        )
    lines(folder / "data" / "raw" / "MindCube_tinybench.jsonl", rows)
    lines(folder / "data" / "raw" / "MindCube.jsonl", rows * 2)
    return str(folder)


# ---- ViewSpatial-Bench

VIEWSPATIAL = [
    ("Camera perspective - Relative Direction", ["scannetv2_val/scene0011_00/280.jpg"], 4, "A"),
    (
        "Person perspective - Scene Simulation Relative Direction",
        [f"scannetv2_val/scene0011_01/{k}.jpg" for k in range(3)],
        4,
        "D",
    ),
    ("Person perspective - Object View Orientation", ["val2017/000000000139.jpg"], 2, "B"),
]
WAYS = ["A. right", "B. front-up", "C. back-left", "D. front"]


def viewspatial(folder: Path) -> str:
    rows = []
    for kind, paths, count, answer in VIEWSPATIAL:
        for k, path in enumerate(paths):
            picture(folder / path, k)
        rows.append(
            dict(
                question_type=kind,
                image_path=[f"ViewSpatial-Bench/{path}" for path in paths],
                question="Where is the counter?",
                answer=WAYS["ABCD".index(answer)],
                choices="\n".join(WAYS[:count]),
            )
        )
    (folder / "ViewSpatial-Bench.json").write_text(json.dumps(rows))
    return str(folder)


# ---- SITE-Bench

SITE = [
    ("counting & existence", "BLINK", ["img/1.png"], ["one", "two", "three", "four"], "B"),
    ("counting & existence", "MMIU", ["img/1.png", "img/2.png"], ["yes", "no"], "A"),
    ("movement prediction & navigation", "VSI-Bench", ["vid/a.mp4"], list("vwxyz"), "E"),
]


def site(folder: Path) -> str:
    for k in (1, 2):
        picture(folder / f"img/{k}.png", k)
    frames(folder / "vid" / "a", 9)
    rows = []
    for category, dataset, visual, options, answer in SITE:
        rows.append(
            dict(
                question=f"What of {dataset}?",
                options=options,
                answer=answer,
                visual=visual,
                category=category,
                dataset=dataset,
            )
        )
    write_parquet(folder / "image_test" / "test-00000-of-00001.parquet", rows[:2])
    write_parquet(folder / "video_test" / "test-00000-of-00001.parquet", rows[2:])
    # Something else that lies in the folder.
    lines(folder / "vid" / "meta.jsonl", [{"a": 1}])
    return str(folder)


# ---- 3DSRBench


def threedsr_rows(base64_image: str) -> list[dict]:
    """Two questions, mirrored and rotated: 4 + 4 rows of four options, 2 + 2 of two."""
    rows = []
    for qid, category, options, answer, flipped in (
        ("AAAA1111", "location_above", ["up", "down", "left", "right"], "B", "B"),
        ("BBBB2222", "height_higher", ["the dog", "the cat"], "A", "B"),
    ):
        for suffix, letter in (("", answer), ("-flip", flipped)):
            count = len(options)
            for turn in range(count):
                turned = options[turn:] + options[:turn]
                name = f"{qid}{suffix}" + (f"-{turn}" if turn else "")
                right = "ABCD"[("ABCD".index(letter) - turn) % count]
                columns = dict(zip("ABCD", [*turned, "nan", ""], strict=False))
                rows.append(
                    dict(
                        index=len(rows),
                        qid=name,
                        question="Where is it?",
                        **columns,
                        answer=right,
                        category=category,
                        image_source="coco",
                        image=base64_image,
                    )
                )
    return rows


def threedsrbench(folder: Path) -> str:
    import base64

    rows = threedsr_rows(base64.b64encode(png()).decode())
    tsv(folder / "3dsrbench_v1_vlmevalkit_circular.tsv", rows)
    return str(folder)


# ---- OmniSpatial

OMNISPATIAL = [
    ("15_1", "Perspective_Taking", "Egocentric", 0),
    ("15_2", "Perspective_Taking", "Hypothetical", 3),
    ("15_1", "Complex_Logic", "Pattern_Recognition", 1),
]


def omnispatial(folder: Path) -> str:
    rows = []
    for name, task, sub_task, answer in OMNISPATIAL:
        picture(folder / task / "15.png", len(rows))
        rows.append(
            dict(
                id=name,
                question="Which one?",
                options=["one", "two", "three", "four"],
                answer=answer,
                task_type=task,
                sub_task_type=sub_task,
            )
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.json").write_text(json.dumps(rows))
    return str(folder)


# ---- The two of the suite that were there before


def blink(folder: Path) -> str:
    row = dict(
        idx="val_Counting_1",
        sub_task="Counting",
        question="How many?",
        prompt="How many?\n(A) 0\n(B) 1",
        image_1=image(1),
        choices=["0", "1"],
        answer="(B)",
    )
    write_parquet(folder / "Counting" / "val-00000-of-00001.parquet", [row], image_1=IMAGE)
    return str(folder)


def embspatial(folder: Path) -> str:
    row = dict(
        data_source="mp3d",
        question_id="mp3d_57",
        relation="close",
        question="Which is nearest?",
        answer_options=["door", "table"],
        answer=1,
        objects=[{"name": "door", "bbox": [1, 1, 9, 9]}, {"name": "table", "bbox": [10, 2, 8, 8]}],
        image=image(2),
    )
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", [row], image=IMAGE)
    return str(folder)


# name of the benchmark -> what writes it
SETS = {
    "vsi-bench": vsi_bench,
    "vsi-bench-debiased": vsi_bench,
    "mmsi": mmsi,
    "mindcube-tiny": mindcube,
    "viewspatial": viewspatial,
    "site": site,
    "3dsrbench": threedsrbench,
    "omnispatial": omnispatial,
    "blink": blink,
    "embspatial": embspatial,
}
