"""Files in the schemas in which others publish their sets, for tests: see also rooms.py, for
SPAR's."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rooms

# an image in a parquet file of the hub
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet(path: Path, rows: list[dict], **types) -> str:
    """A parquet file; types of the columns that pyarrow would guess otherwise. Returns the set's
    folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    guessed = pa.Table.from_pylist(
        [{k: v for k, v in row.items() if k not in types} for row in rows]
    )
    columns = {name: guessed[name] for name in guessed.column_names}
    columns |= {name: pa.array([row[name] for row in rows], kind) for name, kind in types.items()}
    pq.write_table(pa.table({name: columns[name] for name in rows[0]}), path)
    return str(path.parent)


# the room's y down -> z up
UP = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])


def scan(seed=3):
    """Any rigid motion: the axes in which ScanNet happens to be."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    world = np.eye(4)
    world[:3, :3], world[:3, 3] = q * np.linalg.det(q), rng.normal(size=3)
    return world


def instance(thing, label):
    w, h, d = 2 * thing.half
    centre = UP[:3, :3] @ thing.centre
    return {
        "bbox_3d": [*centre, w, d, h, -thing.yaw, 0.0, 0.0],
        "bbox_label_3d": label,
        "bbox_id": label,
    }


def embodiedscan(file, room, instances=None, **changes):
    """embodiedscan_infos_*.pkl: the room as a scene of ScanNet in the world of scan(), and another
    set's."""
    instances = instances or [instance(thing, k) for k, thing in enumerate(room.things)]
    four = np.eye(4)
    four[:3, :3] = rooms.matrix(room.cameras[0])
    scene = {
        "sample_idx": f"scannet/{rooms.SCENE}",
        "axis_align_matrix": UP @ np.linalg.inv(scan()),
        "cam2img": four,
        "depth_cam2img": four,
        "instances": instances,
        "images": [{"img_path": "a.jpg", "cam2global": np.eye(4)}],
    }
    other = {"sample_idx": "3rscan/x", "images": []}
    kinds = {f"{thing.name} {k}": k for k, thing in enumerate(room.things)}
    content = {
        "metainfo": {"categories": kinds, "DATASET": "EmbodiedScan"},
        "data_list": [other, scene | changes],
    }
    file.write_bytes(pickle.dumps(content, protocol=4))
