"""How fast rows are read and images made into patches, per core, and how that compares with
transformers.

    python -m bench.data --images 32 --size 1296 968
    python -m bench.data --model Qwen/Qwen3-VL-8B-Instruct

Rooms are rendered once, at a quarter of the size, and enlarged; they are read as JPEG files, as a
lab's are. A core's second is a second of CPU time, of all threads together: other jobs on the
machine do not count.

    rows      data.load on our own format: JSON, checks, and every image decoded (a second time: remembered)
    parquet   data.benchmarks.load on CV-Bench's schema: image bytes in memory, headers read
    decode    Pillow alone: file -> RGB
    ours      model.processor.Processor: file -> decode, resize, normalise, patches, text, positions -> Batch
    theirs    transformers' image processor on the same decoded images, plus that decoding

And by the clock, in batches of one image each, with --workers processes that make the images ahead;
and what of it remains to the process that trains.
"""

import io
import json
import os
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import flags
from data import benchmarks
from data.rooms.scene import scene
from flags import Count, CountOrZero, Seed
from model import tiny
from model.processor import Processor
from srreal import Example


@dataclass
class Config:
    # whose processor; None: a tiny checkpoint, 16 px patches, 1280 tokens at most
    model: str | None = None
    images: Count = 16  # how many different ones
    size: tuple[Count, Count] = (1296, 968)  # width, height: ScanNet's
    workers: CountOrZero = 2
    seed: Seed = 0

    def __post_init__(self):
        flags.check(self)


def pictures(config: Config, folder: Path) -> list[str]:
    """JPEG files, with noise: a smooth image would decode faster than a photograph."""
    rng = np.random.default_rng(config.seed)
    files = []
    for k in range(config.images):
        small = scene(config.seed, k, tuple(side // 4 for side in config.size))[1][0]
        # Rendering takes longer than all that is measured here: a sixteenth of the pixels will do.
        pixels = np.asarray(small.resize(config.size, Image.Resampling.BICUBIC), np.float32)
        pixels = (pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)
        files.append(str(folder / f"{k}.jpg"))
        Image.fromarray(pixels).save(files[-1], quality=92)
    return files


def checkpoint(folder: Path) -> str:
    tiny.write("qwen3_vl", folder)
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text()) | {"patch_size": 16}
    # A token is 2 x 2 patches of 16 pixels, 32 x 32: so at least 4 tokens, at most 1,280.
    settings["size"] = {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 1280}
    file.write_text(json.dumps(settings))
    return str(folder)


def per_core(count: int, work) -> float:
    """count over the CPU seconds of work(): the better of two runs."""
    seconds = []
    for _ in range(2):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return count / min(seconds)


def row_rates(config: Config, files: list[str], folder: Path) -> dict[str, float]:
    # Rows that share images: 2,000 at least, as a few would be read in no time.
    rows = []
    copies = 1 + 2000 // len(files)
    for k, file in enumerate(files * copies):
        rows.append(dict(id=str(k), path="lor", images=[file], question="How far?", answer="1.5"))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The first call decodes, the second one remembers: a cache of this run alone.
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    start = time.process_time()
    data.load([str(folder)])
    first = len(rows) / (time.process_time() - start)
    import pyarrow as pa
    from pyarrow import parquet

    fields = dict(
        idx=0, task="Depth", source="Omni3D", choices=["a", "b"], answer="(A)", prompt="?"
    )
    table = [
        fields | dict(image={"bytes": Path(file).read_bytes(), "path": file}) for file in files
    ]
    parquet.write_table(pa.Table.from_pylist(table), folder / "test_3d.parquet")
    warnings.simplefilter("ignore")  # that these are not all of CV-Bench's rows
    again = per_core(len(rows), lambda: data.load([str(folder)]))
    return {
        "rows, images decoded": first,
        "rows, remembered": again,
        "rows, parquet": per_core(len(files), lambda: benchmarks.load("cv-bench", folder)),
    }


def image_rates(
    config: Config, files: list[str], source: str
) -> tuple[dict[str, float], float, int]:
    """Rates; the largest difference of a pixel value; patches in all."""
    decode = lambda file: Image.open(io.BytesIO(Path(file).read_bytes())).convert("RGB")  # noqa: E731
    examples = [Example(str(k), "lor", [file], "How far?", "1.5") for k, file in enumerate(files)]
    batches = []
    ours = lambda: batches.append(Processor.from_pretrained(source)(examples))  # noqa: E731  nothing remembered
    # A fresh processor a call, as it remembers images; what that costs is taken off again below.
    setup = per_core(1, lambda: Processor.from_pretrained(source))
    theirs = Processor.from_pretrained(source).images
    made = []
    rates = {"decode": per_core(len(files), lambda: [decode(file) for file in files])}
    rates["ours"] = 1 / (1 / per_core(len(files), ours) - 1 / setup / len(files))
    rates["theirs"] = per_core(
        len(files),
        lambda: made.append([theirs(images=[decode(file)], return_tensors="pt") for file in files]),
    )
    want = torch.cat([one["pixel_values"] for one in made[-1]])
    return rates, (batches[-1].pixel_values - want).abs().max().item(), len(want)


def ahead_rates(config: Config, files: list[str], source: str) -> dict[str, float]:
    """Images a second by the clock without and with workers; images a CPU second of this
    process."""
    examples = [Example(str(k), "lor", [file], "How far?", "1.5") for k, file in enumerate(files)]
    rates = {}
    for workers in dict.fromkeys((0, config.workers)):
        processor = Processor.from_pretrained(source, workers=workers)
        for _ in range(2):  # the first time the processes start
            # Forgets what was made ahead, so that the second time makes it again.
            processor.prefetch([])
            clock = time.perf_counter()
            own = time.process_time()
            processor.prefetch(examples)
            for example in examples:
                processor([example])
            seconds = time.perf_counter() - clock
            # Without the workers' time: what is left to the process that trains.
            own = time.process_time() - own
        rates |= {
            f"{workers} workers": len(files) / seconds,
            f"{workers} workers, own": len(files) / own,
        }
    return rates


def main(config: Config) -> dict[str, float]:
    # Rates are a core's.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = pictures(config, folder)
        source = config.model or checkpoint(folder / "model")
        rates, apart, patches = image_rates(config, files, source)
        ahead = ahead_rates(config, files, source)
        rows = row_rates(config, files, folder)
    print(
        f"{len(files)} JPEGs of {config.size[0]} x {config.size[1]}, {patches // len(files)} patches each; "
        f"Python {sys.version.split()[0]}, torch {torch.__version__}; per core and second:"
    )
    for name, rate in rows.items():
        print(f"  {name:24}{rate:12,.0f}")
    for name, rate in rates.items():
        print(f"  images, {name:16}{rate:12,.1f}")
    print(
        f"  ours / theirs {rates['ours'] / rates['theirs']:.2f}; pixel values apart by at most {apart:.1e}"
    )
    print("images, by the clock (own: a CPU second of the process that trains):")
    for name, rate in ahead.items():
        print(f"  {name:24}{rate:12,.1f}")
    return rows | rates | ahead


if __name__ == "__main__":
    main(flags.parse(Config, __doc__))
