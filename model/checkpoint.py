"""Hugging Face checkpoints in and out, without a byte of pickle.

The published files come in two layouts, and transformers writes either:

    older   visual.*         model.*                    lm_head.*
    newer   model.visual.*   model.language_model.*     lm_head.*
    ours    vision.*         decoder.*                  lm_head.*       region.* points.* head3d.*
    (spatial.safetensors)

A model remembers the layout and the dtype of every tensor it was loaded from, and saves in the
same, so that transformers' own class (and whatever else reads Qwen-VL) loads what we trained.
Saving is atomic: everything is written and synced in a directory aside, which then takes the place
of the old one in a single rename, with what others have put into that one.
"""

import contextlib
import ctypes
import glob
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from errors import UserError
from model import lora

SPATIAL = ("region.", "points.", "head3d.")
SHARD_BYTES = 4_000_000_000
# Longest first; `model.` alone is the older layout's decoder.
PREFIXES = (
    ("model.language_model.", "decoder."),
    ("model.visual.", "vision."),
    ("visual.", "vision."),
    ("model.", "decoder."),
    ("lm_head.", "lm_head."),
)
# What a save may write. An old one of these must not stand beside the new: a reader might prefer
# it.
OWN = re.compile(
    r"(model(-\d+-of-\d+)?|spatial)\.safetensors(\.index\.json)?|chat_template\.\w+|merges\.txt"
    r"|((generation|\w*processor|tokenizer)_)?config\.json|(tokenizer|vocab|added_tokens|special_tokens_map)\.json"
)


class CheckpointError(UserError, ValueError):
    """A checkpoint that can't be loaded or saved; one line that says which file or tensor, and what
    to do."""


@dataclass
class Origin:
    """Where a model came from: its directory, and for each parameter its name and dtype on disk."""

    directory: Path
    names: dict[str, str]
    dtypes: dict[str, torch.dtype]


def load(source: str, device=None, dtype: torch.dtype | None = None, fuse: bool = True):
    """A QwenVL from a directory or hub id. dtype None: the decoder's dtype on disk, for the whole
    model.

    fuse: put weights that the sampler multiplies one input with side by side. Without it, a model
    on a CPU in the dtype on disk takes no memory of its own: its weights are the file's pages.
    """
    from model.qwen_vl import QwenVL

    directory = resolve(source)
    config = read_config(directory)
    with torch.device("meta"):
        model = QwenVL(config)
    state, origin = _read(directory, model)
    spatial, kind = _read_spatial(directory)
    _check(directory, model, state, spatial)
    dtype = dtype or origin.dtypes["decoder.norm.weight"]
    for name in list(state):
        state[name] = state[name].to(device=device or "cpu", dtype=dtype)
    state |= {
        name: tensor.to(device=device or "cpu", dtype=dtype) for name, tensor in spatial.items()
    }
    model.load_state_dict(state, strict=False, assign=True)
    if not spatial:
        _init_spatial(model, device or "cpu", dtype)
    state.clear()  # so that what is joined next leaves at once
    if fuse:
        model.adjoin()
    model.points_kind, model.origin = kind, origin
    return model.eval()


def resolve(source: str) -> Path:
    """A local directory as it is, else a hub id's snapshot (downloaded on first use)."""
    if Path(source).is_dir():
        return Path(source)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{source}: no such directory (nor a hub id like Qwen/Qwen2.5-VL-3B-Instruct)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(source, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"])
        )
    except Exception as error:  # the hub's errors are many; a user needs one line
        reason = str(error).strip().splitlines()[0][:160]
        raise CheckpointError(
            f"{source}: no such directory, and the hub has none ({reason})"
        ) from error


def read_config(directory: Path):
    """transformers' config object of a checkpoint of the three families; CheckpointError for any
    other."""
    from model.qwen_vl import Sizes

    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: no config.json, so no checkpoint in the Hugging Face layout"
        )
    try:
        config = AutoConfig.from_pretrained(directory)
        Sizes.of(config)
    except (KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: no {error} in it; copy the original config.json") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: {str(error).strip().splitlines()[0]}") from error
    return config


def read_json(path: Path, key: str | None = None) -> dict:
    """The object that a JSON file holds, or that it holds under `key`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values = values[key] if key else values
        if not isinstance(values, dict):
            raise TypeError(f"{type(values).__name__} instead of an object")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not the JSON that it should be ({error}); copy it again"
        ) from error
    return values


def _files(directory: Path) -> list[Path]:
    index, names = directory / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        names = sorted({str(name) for name in read_json(index, "weight_map").values()})
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory}: {missing[0]} is missing ({len(missing)} of {len(names)} files); copy it again"
        )
    return [directory / name for name in names]


def _read(directory: Path, model) -> tuple[dict[str, Tensor], Origin]:
    state, origin = {}, Origin(directory.absolute(), {}, {})
    for path in _files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    ours = rename(name)
                    again = ours == "lm_head.weight" and model.lm_head is None  # the tied embedding
                    if again or ours.endswith("rotary_emb.inv_freq"):
                        continue
                    state[ours] = file.get_tensor(name)
                    origin.names[ours], origin.dtypes[ours] = name, state[ours].dtype
                    if not state[ours].is_floating_point() or state[ours].element_size() < 2:
                        kind = str(state[ours].dtype).removeprefix("torch.")
                        raise CheckpointError(
                            f"{path}: {name} is {kind}; quantised weights don't load"
                        )
        except SafetensorError as error:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({error}); copy it again"
            ) from error
    return state, origin


def rename(name: str) -> str:
    """A tensor's name on disk -> ours; one of neither layout stays as it is (and is reported as
    surplus)."""
    for theirs, ours in PREFIXES:
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name


def on_disk(name: str) -> str:
    """Our name -> that of the newer published layout, for messages."""
    theirs, ours = next((pair for pair in PREFIXES if name.startswith(pair[1])), ("", ""))
    return theirs + name[len(ours) :]


def _read_spatial(directory: Path) -> tuple[dict[str, Tensor], str]:
    path = directory / "spatial.safetensors"
    if not path.is_file():
        return {}, "metric"
    try:
        with safe_open(path, framework="pt") as file:
            kind = (file.metadata() or {}).get("points", "metric")
            return {name: file.get_tensor(name) for name in file.keys()}, kind  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); copy it again"
        ) from error


def _check(directory: Path, model, state: dict[str, Tensor], spatial: dict[str, Tensor]) -> None:
    wanted = {name: p.shape for name, p in model.named_parameters()}
    found = {**state, **spatial}
    missing = [n for n in wanted if n not in found and (spatial or not n.startswith(SPATIAL))]
    surplus = [n for n in found if n not in wanted]
    wrong = [n for n in found if n in wanted and found[n].shape != wanted[n]]
    for what, names in (("lacks", missing), ("has the unknown tensor", surplus)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            what = f"{what} {on_disk(names[0])}{more}"
            raise CheckpointError(
                f"{directory}: the checkpoint {what}; is config.json of these weights?"
            )
    if wrong:
        n = wrong[0]
        shapes = tuple(found[n].shape), tuple(wanted[n])
        raise CheckpointError(
            f"{directory}: {on_disk(n)} is {shapes[0]}, config.json wants {shapes[1]}"
        )


def _init_spatial(model, device, dtype: torch.dtype) -> None:
    """The extra weights at their start: seeded, and such that a pretrained model's logits don't
    change."""
    for part in (model.region, model.points, model.head3d):
        part.to_empty(device=device).to(dtype)
    model.region.init_like(model.decoder.embed_tokens.weight)
    model.points.init_silent()
    model.head3d.init()


def save(model, directory: str | Path, processor=None) -> None:
    """Atomically replaces `directory` by the model's checkpoint: weights, spatial.safetensors, the
    source's other files, and the processor's settings where one is given. What an older checkpoint
    there holds beyond that is kept; a directory that holds something else is refused."""
    directory = Path(directory).resolve()  # the rename would replace a link, not what it points to
    if directory.exists() and not (directory / "config.json").is_file():
        if not directory.is_dir() or any(directory.iterdir()):
            raise CheckpointError(
                f"{directory}: exists and holds no checkpoint; save to another directory"
            )
    aside = directory.parent / f".{directory.name}.{os.getpid()}.tmp"
    for stale in directory.parent.glob(f".{glob.escape(directory.name)}.*.tmp"):
        pid = stale.suffixes[-2][1:]
        # its process was killed
        if stale == aside or pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(stale, ignore_errors=True)
    try:
        write(model, aside, processor)
        _keep_foreign(directory, aside)
        replace(aside, directory)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _keep_foreign(old: Path, new: Path) -> None:
    """What is in `old` and no save writes, into `new` as well: by hard links, so that size doesn't
    matter."""

    def ours(folder, names):
        return [
            n for n in names if Path(folder) == old and (OWN.fullmatch(n) or (new / n).exists())
        ]

    def link(source, target):
        try:
            os.link(source, target)
        except OSError:  # a file system without
            shutil.copy2(source, target)

    if old.exists():
        shutil.copytree(
            old, new, symlinks=True, ignore=ours, copy_function=link, dirs_exist_ok=True
        )


def write(model, directory: Path, processor=None, weights: dict[str, Tensor] | None = None) -> None:
    """The files of a checkpoint, not atomically (see `save`), with adapters merged.

    weights: whole tensors by our names; None: the model's own parameters.
    """
    from model.processor import Processor

    origin = model.origin
    if processor is None:
        # no tokenizer, or no room: files as they are
        with contextlib.suppress(ValueError, OSError):
            processor = Processor(origin.directory)
    if processor is None:
        copy_files(origin.directory, directory)
    else:
        processor.save(directory)  # the same, and the tokenizer with <mask> in it
    if weights is None:
        weights = {name: p.detach() for name, p in model.named_parameters()}
    tensors = lora.merge(weights)
    spatial = {n: t.contiguous().cpu() for n, t in tensors.items() if n.startswith(SPATIAL)}
    save_file(spatial, directory / "spatial.safetensors", metadata={"points": model.points_kind})
    base = {n: t.to("cpu", origin.dtypes[n]) for n, t in tensors.items() if n in origin.names}
    _write_shards({origin.names[n]: t.contiguous() for n, t in base.items()}, directory)


def _write_shards(tensors: dict[str, Tensor], directory: Path) -> None:
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, directory / file, metadata={"format": "pt"})
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": places,
    }
    (directory / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2, sort_keys=True)
    )


def copy_files(source: Path, directory: Path) -> None:
    """Everything of a checkpoint but its weights: config, tokenizer, processor, template, licence,
    ..."""
    weights = (
        ".safetensors",
        ".index.json",
        ".bin",
        ".pt",
        ".pth",
        ".gguf",
        ".h5",
        ".msgpack",
        ".onnx",
    )
    if not source.is_dir():
        raise CheckpointError(
            f"{source}: gone since it was loaded, and config and tokenizer with it"
        )
    directory.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(weights) and path.parent != directory:
            shutil.copyfile(path, directory / path.name)


def replace(aside: Path, directory: Path) -> None:
    """Makes the finished directory `aside` be `directory`, in one step where the kernel exchanges
    names."""
    # no dangling links
    for path in [p for p in aside.rglob("*") if p.is_file() or p.is_dir()] + [aside]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if not directory.exists():
        os.rename(aside, directory)
    elif not _exchange(aside, directory):
        old = aside.with_suffix(".old")  # an old kernel: two steps, the old one whole in between
        os.rename(directory, old)
        os.rename(aside, directory)
        aside = old
    shutil.rmtree(aside, ignore_errors=True)
    handle = os.open(directory.parent, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names at once, by renameat2(2) with RENAME_EXCHANGE."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, exchange = -100, 2
    renameat2 = getattr(libc, "renameat2", None)
    return (
        renameat2 is not None
        and renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0
    )
