"""Weights in and out as safetensors, without a byte of pickle; a save is whole or it isn't there.

The published files come in two layouts, and transformers writes either:

    older   visual.*         model.*                    lm_head.*
    newer   model.visual.*   model.language_model.*     lm_head.*
    ours    vision.*         decoder.*                  lm_head.*       region.* points.* head3d.*

What has no place in either (region token, point map, 3D head) is in spatial.safetensors beside
them. A model remembers the layout and the dtype of every tensor that it was loaded from, its
`Origin`, and is saved in the same, so that transformers' own class (and whatever else reads
Qwen-VL) loads what we trained.

This file knows named tensors only; qwen_vl.py puts them into a model.
"""

import glob
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import UserError
from model import lora
from model.files import CheckpointError, copy_files, read_json, read_tokenizer, retired

SPATIAL = ("region.", "points.", "head3d.")
SHARD_BYTES = 4_000_000_000
INDEX = "model.safetensors.index.json"
# Longest first; `model.` alone is the older layout's decoder.
PREFIXES = (
    ("model.language_model.", "decoder."),
    ("model.visual.", "vision."),
    ("visual.", "vision."),
    ("model.", "decoder."),
    ("lm_head.", "lm_head."),
)
# What a save may write. An old file of these must not stand beside the new ones: a reader might
# prefer it.
WRITTEN_BY_SAVE = re.compile(
    r"(model(-\d+-of-\d+)?|spatial)\.safetensors(\.index\.json)?|chat_template\.\w+|merges\.txt"
    r"|((generation|\w*processor|tokenizer)_)?config\.json"
    r"|(tokenizer|vocab|added_tokens|special_tokens_map)\.json"
)


@dataclass
class Origin:
    """Where a model came from: its directory, and for each parameter its name and dtype on disk."""

    directory: Path
    names: dict[str, str]
    dtypes: dict[str, torch.dtype]


# ---- Names


def rename(name: str) -> str:
    """Turn a tensor's name on disk into ours; one of neither layout stays as it is (and is reported
    as surplus)."""
    for on_disk_prefix, our_prefix in PREFIXES:
        if name.startswith(on_disk_prefix):
            return our_prefix + name.removeprefix(on_disk_prefix)
    return name


def on_disk(name: str) -> str:
    """Turn our name into that of the newer published layout, for messages."""
    for on_disk_prefix, our_prefix in PREFIXES:
        if name.startswith(our_prefix):
            return on_disk_prefix + name.removeprefix(our_prefix)
    return name


# ---- Reading


@contextmanager
def open_tensors(path: Path) -> Iterator:
    """Open a safetensors file; a torn one is named."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); copy it again"
        ) from error


def weight_files(directory: Path) -> list[Path]:
    """List the files that hold the published weights: those of the index, else the single one."""
    names = ["model.safetensors"]
    if (directory / INDEX).is_file():
        places = read_json(directory / INDEX, "weight_map").values()
        names = sorted({str(name) for name in places})
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory}: {missing[0]} is missing ({len(missing)} of {len(names)} files);"
            " copy it again"
        )
    return [directory / name for name in names]


def read_weights(directory: Path, tied: bool) -> tuple[dict[str, Tensor], Origin]:
    """Read the published weights by our names; on a CPU they are the file's own pages.

    tied: the head is the embedding, so one that stands in the file as well is left out.
    """
    weights = {}
    origin = Origin(directory.absolute(), {}, {})
    for path in weight_files(directory):
        with open_tensors(path) as file:
            for name_on_disk in file.keys():  # noqa: SIM118 (not a dict)
                name = rename(name_on_disk)
                is_repeated = tied and name == "lm_head.weight"
                # The rotary frequencies follow from the config.
                if is_repeated or name.endswith("rotary_emb.inv_freq"):
                    continue
                tensor = file.get_tensor(name_on_disk)
                if not tensor.is_floating_point() or tensor.element_size() < 2:
                    kind = str(tensor.dtype).removeprefix("torch.")
                    raise CheckpointError(
                        f"{path}: {name_on_disk} is {kind}; quantised weights don't load"
                    )
                weights[name] = tensor
                origin.names[name] = name_on_disk
                origin.dtypes[name] = tensor.dtype
    return weights, origin


def read_spatial(directory: Path) -> dict[str, Tensor]:
    """Read our extra weights; none where a checkpoint has none."""
    path = directory / "spatial.safetensors"
    if not path.is_file():
        return {}
    with open_tensors(path) as file:
        points = (file.metadata() or {}).get("points", "metric")
        if points != "metric":
            raise CheckpointError(
                f"{path}: trained with {points} point maps; only metric ones are supported"
            )
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def check_weights(
    directory: Path, weights: dict[str, Tensor], wanted: dict[str, torch.Size], spatial: bool
) -> None:
    """Compare names and shapes with those that config.json asks for; CheckpointError names one.

    spatial: the extra weights have to be there, too.
    """
    surplus = [name for name in weights if name not in wanted]
    missing = [name for name in wanted if name not in weights]
    if not spatial:
        missing = [name for name in missing if not name.startswith(SPATIAL)]
    for what, names in (("lacks", missing), ("has the unknown tensor", surplus)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{directory}: the checkpoint {what} {on_disk(names[0])}{more};"
                " is config.json of these weights?"
            )
    for name, tensor in weights.items():
        if tensor.shape != wanted[name]:
            raise CheckpointError(
                f"{directory}: {on_disk(name)} is {tuple(tensor.shape)},"
                f" config.json wants {tuple(wanted[name])}"
            )


# ---- Saving


def save(directory: str | Path, weights: dict[str, Tensor], origin: Origin, processor=None) -> None:
    """Atomically replace `directory` by a checkpoint (see `write`).

    What an older checkpoint there holds beyond what a save writes is kept; a directory that holds
    something else is refused.
    """
    directory = Path(directory).resolve()  # the rename would replace a link, not what it points to
    restore_retired(directory)
    is_checkpoint = (directory / "config.json").is_file()
    is_empty = directory.is_dir() and not any(directory.iterdir())
    if directory.exists() and not is_checkpoint and not is_empty:
        raise CheckpointError(
            f"{directory}: exists and holds no checkpoint; save to another directory"
        )
    aside = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    remove_stale(directory, aside)
    try:
        write(aside, weights, origin, processor)
        if directory.exists():
            keep_foreign(directory, aside)
        replace(aside, directory)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def write(directory: Path, weights: dict[str, Tensor], origin: Origin, processor=None) -> None:
    """Write the files of a checkpoint, not atomically (see `save`), with adapters merged.

    weights are whole tensors by our names. The files beside them are the origin's and, where a
    processor is given, its settings.
    """
    if processor is not None:
        processor.save(directory)
    else:
        copy_files(origin.directory, directory)
        # As a processor would, with <mask>. Where there is no tokenizer, or no room, the files stay
        # as they are.
        with suppress(UserError):
            rows = len(weights["decoder.embed_tokens.weight"])
            read_tokenizer(origin.directory, rows).save_pretrained(directory)
    spatial = {}
    published = {}
    for name, tensor in lora.merge(weights).items():
        if name.startswith(SPATIAL):
            spatial[name] = tensor.contiguous().cpu()
        elif name in origin.names:
            tensor = tensor.to("cpu", origin.dtypes[name])
            published[origin.names[name]] = tensor.contiguous()
    save_file(spatial, directory / "spatial.safetensors", metadata={"points": "metric"})
    write_shards(published, directory)


def write_shards(tensors: dict[str, Tensor], directory: Path) -> None:
    """Write tensors into as many files as transformers would, with an index where it is several."""
    # By names alone: what shares memory (fused weights, the pages of one file) may part.
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=attrgetter("nbytes"),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name] for name in names}
        save_file(shard, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))


def keep_foreign(old: Path, new: Path) -> None:
    """Take what is in `old`, and no save writes, over into `new`.

    By hard links, so that size doesn't matter.
    """

    def not_foreign(folder: str, names: list[str]) -> list[str]:
        if Path(folder) != old:
            return []
        return [name for name in names if WRITTEN_BY_SAVE.fullmatch(name) or (new / name).exists()]

    shutil.copytree(
        old, new, symlinks=True, ignore=not_foreign, copy_function=link, dirs_exist_ok=True
    )


def link(source: str, target: str) -> None:
    """Link a file, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def replace(aside: Path, directory: Path) -> None:
    """Put the finished directory `aside` in the place of `directory`.

    In two renames: between them the old one stands whole beside, where `resolve` finds it and the
    next save puts it back.
    """
    # On the disk before it has its name: after a power cut a name may outlive its content.
    sync([path for path in aside.rglob("*") if path.is_file() or path.is_dir()])  # no dangling link
    sync([aside])
    if directory.exists():
        os.rename(directory, retired(directory))
    os.rename(aside, directory)
    shutil.rmtree(retired(directory), ignore_errors=True)
    sync([directory.parent])


def restore_retired(directory: Path) -> None:
    """Put back the checkpoint that a killed save left between its two renames."""
    if retired(directory).exists() and not directory.exists():
        os.rename(retired(directory), directory)
    shutil.rmtree(retired(directory), ignore_errors=True)


def remove_stale(directory: Path, aside: Path) -> None:
    """Remove what saves of `directory` by processes that were killed left behind."""
    for stale in directory.parent.glob(f".{glob.escape(directory.name)}.*.tmp"):
        pid = stale.suffixes[-2][1:]
        is_dead = pid.isdigit() and not Path("/proc", pid).exists()
        if stale == aside or is_dead:
            shutil.rmtree(stale, ignore_errors=True)


def sync(paths: Iterable[Path]) -> None:
    """Wait until files and directories are on the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
