"""The files of a Hugging Face checkpoint beside its weights: found, checked, read and copied.

What is missing or torn in them is the user's to mend, and ends in one line that names the file.
"""

import json
import shutil
from pathlib import Path

from transformers import AddedToken, AutoConfig, AutoTokenizer

from errors import UserError
from model.families import DecoderSizes

WEIGHTS = (
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


class CheckpointError(UserError, ValueError):
    """A checkpoint that can't be loaded or saved; one line that says which file or tensor, and what
    to do."""


def resolve(source: str) -> Path:
    """Return a local directory as it is, else a hub id's snapshot (downloaded on first use)."""
    directory = Path(source)
    if directory.is_dir():
        return directory
    if retired(directory).is_dir():
        return retired(directory)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{source}: no such directory (nor a hub id like Qwen/Qwen2.5-VL-3B-Instruct)"
        )
    # Here, since a local directory needs no hub.
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            source, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]
        )
    except Exception as error:  # the hub's errors are many; a user needs one line
        reason = str(error).strip().splitlines()[0][:160]
        raise CheckpointError(
            f"{source}: no such directory, and the hub has none ({reason})"
        ) from error
    return Path(snapshot)


def retired(directory: Path) -> Path:
    """Where a checkpoint stands, whole, while a save puts the new one in its place."""
    return directory.with_name(f".{directory.name}.old")


def read_json(path: Path, key: str | None = None) -> dict:
    """Return the object that a JSON file holds, or that it holds under `key`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if key is not None:
            values = values[key]
        if not isinstance(values, dict):
            raise TypeError(f"{type(values).__name__} instead of an object")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not the JSON that it should be ({error}); copy it again"
        ) from error
    return values


def read_config(directory: Path):
    """Read transformers' config object; CheckpointError for a family that isn't supported."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: no config.json, so no checkpoint in the Hugging Face layout"
        )
    try:
        config = AutoConfig.from_pretrained(directory)
        DecoderSizes.of(config)
    except (KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: no {error} in it; copy the original config.json") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: {str(error).strip().splitlines()[0]}") from error
    return config


def image_settings(directory: Path) -> list[tuple[Path, dict, dict]]:
    """Find the image processor's settings: (file, its content, the part of it that they are).

    There may be two such files; the newer one nests them.
    """
    found = []
    older = directory / "preprocessor_config.json"
    if older.is_file():
        content = read_json(older)
        found.append((older, content, content))
    newer = directory / "processor_config.json"
    if newer.is_file():
        content = read_json(newer)
        found.append((newer, content, content.get("image_processor")))
    return [(path, content, settings) for path, content, settings in found if settings]


def check_files(directory: Path) -> None:
    """Name the file that a tokenizer or image processor lacks.

    Without it transformers makes an empty tokenizer, or explains itself in a paragraph.
    """
    names = {path.name for path in directory.iterdir()}
    if {"vocab.json", "merges.txt"} <= names:
        names.add("tokenizer.json")
    if image_settings(directory):
        names.add("preprocessor_config.json")
    for name in ("tokenizer_config.json", "tokenizer.json", "preprocessor_config.json"):
        if name not in names:
            raise CheckpointError(f"{directory}: no {name}; copy it from the original checkpoint")
    for path in directory.glob("tokenizer*.json"):
        read_json(path)  # transformers' error on a torn one names no file


def read_tokenizer(directory: Path, rows: int):
    """Read the tokenizer with its chat template, for an embedding of `rows` rows.

    `<mask>`, which stands for a region, takes the vocabulary's first spare row.
    """
    check_files(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    mask = AddedToken("<mask>", special=True, normalized=False)
    tokenizer.add_tokens([mask], special_tokens=True)
    vocab = tokenizer.get_vocab()
    if vocab["<mask>"] >= rows:
        raise CheckpointError(
            f"{directory}: no row for <mask>: {len(vocab) - 1} tokens, {rows} embeddings"
        )
    legacy = directory / "chat_template.json"
    if tokenizer.chat_template is None and legacy.is_file():
        tokenizer.chat_template = read_json(legacy).get("chat_template")
    if not (tokenizer.chat_template or "").strip():
        raise CheckpointError(f"{directory}: no chat_template.jinja, nor an older form of it")
    return tokenizer


def copy_files(source: Path, directory: Path) -> None:
    """Copy everything of a checkpoint but its weights: config, tokenizer, template, licence, ..."""
    if not source.is_dir():
        raise CheckpointError(
            f"{source}: gone since it was loaded, and config and tokenizer with it"
        )
    directory.mkdir(parents=True, exist_ok=True)
    if source.resolve() == directory.resolve():
        return
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(WEIGHTS):
            shutil.copyfile(path, directory / path.name)
