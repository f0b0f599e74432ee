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

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import UserError
from model import lora
from model.files import (
    WEIGHTS,
    CheckpointError,
    copy_files,
    note,
    read_config,
    read_json,
    read_tokenizer,
    retired,
    save_tokenizer,
    set_vocab_size,
)

# Our extra parts, by the prefix of their tensors.
PARTS = {"region": "region token", "points": "point map", "head3d": "3D head"}
SPATIAL = tuple(f"{part}." for part in PARTS)
# Qwen3.5's head for several tokens at once, which is neither used nor trained here, but served.
CARRIED = "mtp."
SHARD_BYTES = 4_000_000_000
INDEX = "model.safetensors.index.json"
EMBEDDING = "decoder.embed_tokens.weight"
HEAD = "lm_head.weight"
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
    r"(model(\.safetensors)?(-\d+-of-\d+)?|spatial)\.safetensors(\.index\.json)?|merges\.txt"
    r"|chat_template\.\w+|additional_chat_templates"
    r"|((generation|\w*processor|tokenizer)_)?config\.json"
    r"|(tokenizer|vocab|added_tokens|special_tokens_map)\.json"
)


@dataclass
class SpatialRecord:
    """What is on record of a checkpoint's extra parts, in spatial.safetensors' metadata."""

    # How it was trained to read regions: token or text; None: it never was, or isn't known.
    regions: str | None = None
    # Names of PARTS that have learnt; None: not known, of an older file.
    trained: set[str] | None = field(default_factory=set)

    @classmethod
    def read(cls, directory: Path) -> "SpatialRecord":
        """Read a checkpoint's record; without extra weights nothing has learnt."""
        path = directory / "spatial.safetensors"
        if not path.is_file():
            return cls()
        with open_tensors(path) as file:
            metadata = file.metadata() or {}
        trained = metadata.get("trained")
        if trained is not None:
            trained = set(filter(None, trained.split(",")))
        return cls(metadata.get("regions"), trained)

    def metadata(self) -> dict[str, str]:
        """Return what safetensors writes of it."""
        # Files with relative point maps say so here, and read_spatial refuses them.
        metadata = {"points": "metric"}
        if self.regions is not None:
            metadata["regions"] = self.regions
        if self.trained is not None:
            metadata["trained"] = ",".join(sorted(self.trained))
        return metadata


@dataclass
class Origin:
    """Where a model came from: its directory, and for each parameter its name and dtype on disk."""

    directory: Path
    names: dict[str, str]
    dtypes: dict[str, torch.dtype]
    record: SpatialRecord = field(default_factory=SpatialRecord)
    # Tensors that are copied as they are when the model is saved: name on disk -> file.
    carried: dict[str, Path] = field(default_factory=dict)


# ---- Names


def rename(name: str) -> str:
    """Turn a tensor's name on disk into ours.

    A name of neither layout stays as it is, and is reported as surplus.
    """
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
    """List the files that hold the weights, as transformers does: the single one before an index.

    What else lies there and looks like weights is named.
    """
    names = ["model.safetensors"]
    if not (directory / names[0]).is_file() and (directory / INDEX).is_file():
        places = read_json(directory / INDEX, "weight_map").values()
        names = sorted({str(name) for name in places})
    # Named, whichever are read: a folder with two sets of weights is seldom meant so.
    others = other_weights(directory, names)
    missing = [name for name in names if not (directory / name).is_file()]
    if others and missing == ["model.safetensors"]:
        remedy = "load it in transformers and save it again with save_pretrained()"
        if others[0].endswith(".safetensors"):
            remedy = f"copy {INDEX} too, which says what they are"
        raise CheckpointError(
            f"{directory}: no model.safetensors, and {', '.join(others)} can't be read; {remedy}"
        )
    if missing:
        raise CheckpointError(
            f"{directory}: {missing[0]} is missing ({len(missing)} of {len(names)} files);"
            " copy it again"
        )
    if others:
        note(f"{directory}: {names[0]} is read; not {', '.join(others)}")
    return [directory / name for name in names]


def other_weights(directory: Path, names: list[str]) -> list[str]:
    """List the files beside those named that look like weights."""
    known = {*names, "spatial.safetensors"}
    if names != ["model.safetensors"]:
        known.add(INDEX)
    others = []
    for path in sorted(directory.iterdir()):
        if path.name.endswith(WEIGHTS) and path.name not in known:
            others.append(path.name)
    return others


def read_weights(directory: Path) -> tuple[dict[str, Tensor], Origin]:
    """Read the published weights by our names; on a CPU they are the file's own pages."""
    weights = {}
    origin = Origin(directory.absolute(), {}, {}, SpatialRecord.read(directory))
    for path in weight_files(directory):
        with open_tensors(path) as file:
            for name_on_disk in file.keys():  # noqa: SIM118 (not a dict)
                if name_on_disk.startswith(CARRIED):
                    origin.carried[name_on_disk] = path
                    continue
                name = rename(name_on_disk)
                # The rotary frequencies follow from the config.
                if name.endswith("rotary_emb.inv_freq"):
                    continue
                if name in weights:
                    raise CheckpointError(
                        f"{path}: {name_on_disk} and {origin.names[name]} are one tensor's names;"
                        " delete one of them"
                    )
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


def tie_head(weights: dict[str, Tensor], origin: Origin, tied: bool) -> bool:
    """Return whether the head is the embedding, as transformers decides it.

    tied: what config.json says. It counts unless the file has both, and they differ. A tied head is
    left out; where it stands alone, it is the embedding.
    """
    if not tied or HEAD not in weights:
        return tied
    # Tying goes both ways.
    if EMBEDDING not in weights:
        weights[EMBEDDING] = weights.pop(HEAD)
        origin.names[EMBEDDING] = origin.names.pop(HEAD)
        origin.dtypes[EMBEDDING] = origin.dtypes.pop(HEAD)
        return True
    if torch.equal(weights[HEAD], weights[EMBEDDING]):
        for table in (weights, origin.names, origin.dtypes):
            del table[HEAD]
        return True
    note(
        f"{origin.directory}: config.json ties the head to the embedding, but the weights have"
        " another one: it is used and saved, as in transformers"
    )
    return False


def grow_vocabulary(weights: dict[str, Tensor], rows: int) -> None:
    """Give embedding and head new rows up to `rows`: the mean of the old ones.

    So a new token's logit is the mean logit, and the others' log-probs stay as good as they are.
    """
    for name in (EMBEDDING, HEAD):
        if name in weights:
            old = weights[name]
            # Of some 150,000 rows: summed in fp32, and rounded once.
            mean = old.float().mean(0, keepdim=True).to(old.dtype)
            weights[name] = torch.cat((old, mean.expand(rows - len(old), -1)))


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
    # A tensor too many is an error as well: it would be missing from what we save.
    surplus = [name for name in weights if name not in wanted]
    missing = [name for name in wanted if name not in weights]
    if not spatial:
        missing = [name for name in missing if not name.startswith(SPATIAL)]
    # All names are compared before any shape: a wrong config.json shows in the names.
    if missing == [HEAD]:
        raise CheckpointError(
            f"{directory}: the checkpoint lacks {HEAD}, and config.json does not tie the head to"
            " the embedding; is its tie_word_embeddings of these weights?"
        )
    if missing:
        instead = f", and has {listed(surplus)} instead" if surplus else ""
        raise CheckpointError(
            f"{directory}: the checkpoint lacks {listed(missing)}{instead}; is config.json of these"
            " weights?"
        )
    if surplus:
        raise CheckpointError(
            f"{directory}: the checkpoint has the unknown tensor {listed(surplus)}, which a save"
            " would drop; is config.json of these weights?"
        )
    for name, tensor in weights.items():
        if tensor.shape != wanted[name]:
            raise CheckpointError(
                f"{directory}: {on_disk(name)} is {tuple(tensor.shape)},"
                f" config.json wants {tuple(wanted[name])}"
            )


def listed(names: list[str]) -> str:
    """Name the first tensor as the files do, and how many there are beside it."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return on_disk(names[0]) + more


# ---- Saving


def save(directory: str | Path, weights: dict[str, Tensor], origin: Origin, processor=None) -> None:
    """Atomically replace `directory` by a checkpoint (see `write`).

    What an older checkpoint there holds beyond what a save writes is kept; a directory that holds
    something else is refused.
    """
    # The rename would replace a link, not what it points to.
    directory = Path(directory).resolve()
    restore_retired(directory)
    is_checkpoint = (directory / "config.json").is_file()
    is_empty = directory.is_dir() and not any(directory.iterdir())
    if directory.exists() and not is_checkpoint and not is_empty:
        raise CheckpointError(
            f"{directory}: exists and holds no checkpoint; save to another directory"
        )
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{directory}: holds an adapter, which would be taken for one of the new weights;"
            " save to another directory"
        )
    aside = directory.with_name(f".{directory.name}.tmp")
    # What a killed save left behind.
    shutil.rmtree(aside, ignore_errors=True)
    try:
        write(aside, weights, origin, processor)
        if directory.exists():
            keep_foreign(directory, aside)
        replace(aside, directory)
    # Ctrl-C, too: what is half written is nobody's to find.
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def write(directory: Path, weights: dict[str, Tensor], origin: Origin, processor=None) -> None:
    """Write the files of a checkpoint, not atomically (see `save`), with adapters merged.

    weights are whole tensors by our names. The files beside them are the origin's and, where a
    processor is given, its settings.
    """
    # The weights decide, and not the config: they may have grown for <mask>.
    rows = len(weights[EMBEDDING])
    if processor is not None:
        processor.save(directory)
    else:
        copy_files(origin.directory, directory)
        # As a processor would, with <mask>. Where there is no tokenizer, or no room, the files stay
        # as they are.
        with suppress(UserError):
            tokenizer, needed = read_tokenizer(origin.directory, rows)
            if needed == rows:
                save_tokenizer(tokenizer, directory)
    # It has grown, for <mask>.
    if read_config(directory).get_text_config().vocab_size != rows:
        set_vocab_size(directory, rows)
    # Each tensor in the dtype that it had on disk; what came with adapters, or was trained in fp32,
    # is rounded here and nowhere else.
    spatial = {}
    published = {}
    for name, tensor in lora.merge(weights).items():
        if name.startswith(SPATIAL):
            spatial[name] = tensor.contiguous().cpu()
        elif name in origin.names:
            tensor = tensor.to("cpu", origin.dtypes[name])
            published[origin.names[name]] = tensor.contiguous()
    published |= read_carried(origin)
    save_tensors(spatial, directory / "spatial.safetensors", origin.record.metadata())
    write_shards(published, directory)


def read_carried(origin: Origin) -> dict[str, Tensor]:
    """Read the tensors that a save copies as they are, by their names on disk."""
    carried = {}
    for path in sorted(set(origin.carried.values())):
        if not path.is_file():
            raise CheckpointError(f"{path}: has gone, and {CARRIED}* is to be copied from it")
        with open_tensors(path) as file:
            for name, place in origin.carried.items():
                if place == path:
                    carried[name] = file.get_tensor(name)
    return carried


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict | None = None) -> None:
    """Write a safetensors file with the permissions that the umask gives; its own are 0600."""
    save_file(tensors, path, metadata=metadata)
    sort_metadata(path)
    # It can't be read without being set.
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def sort_metadata(path: Path) -> None:
    """Write a safetensors file's metadata in the order of their names; it has them in any.

    So equal tensors make equal files, byte for byte.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        # Blanks behind it align what follows. It is as long as before; if not, it stays.
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


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
        save_tensors(shard, directory / file, {"format": "pt"})
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


def sync(paths: Iterable[Path]) -> None:
    """Wait until files and directories are on the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        # Of a directory it is the names in it that are written, of a file its content.
        os.fsync(handle)
        os.close(handle)
