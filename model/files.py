"""The files of a Hugging Face checkpoint beside its weights: found, checked, read and copied.

What is missing or torn in them is the user's to mend, and ends in one line that names the file.
"""

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import huggingface_hub
from PIL import Image
from tokenizers import Regex, pre_tokenizers
from transformers import AddedToken, AutoConfig, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from errors import UserError
from model.families import FAMILIES, DecoderSizes, VisionSizes, check_family

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
TEMPLATE_FOLDER = "additional_chat_templates"
# Rows that the embedding grows to a multiple of, where <mask> needs one.
ROW_MULTIPLE = 64


class CheckpointError(UserError, ValueError):
    """A checkpoint that can't be loaded or saved.

    One line that says which file or tensor, and what to do.
    """


def resolve(source: str) -> Path:
    """Return a local directory as it is, else a hub id's snapshot (downloaded on first use).

    A run's directory means its newest whole checkpoint.
    """
    directory = Path(checkpoint_of(source))
    if directory.is_dir():
        check_readable(directory)
        return directory
    # A save was killed between its two renames.
    if retired(directory).is_dir():
        return retired(directory)
    # Owner and name, and nothing that can only be a path: a mistyped path must not ask the hub.
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{source}: no such directory (nor a hub id like Qwen/Qwen2.5-VL-3B-Instruct)"
        )
    try:
        # Without weights in other formats, which repositories may keep beside the safetensors.
        snapshot = huggingface_hub.snapshot_download(
            source, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]
        )
    except Exception as error:  # the hub's errors are many; a user needs one line
        reason = str(error).strip().splitlines()[0][:160]
        raise CheckpointError(
            f"{source}: no such directory, and the hub has none ({reason})"
        ) from error
    return Path(snapshot)


def note(words: str) -> None:
    """Say something about a checkpoint, beside what a command prints."""
    print(words, file=sys.stderr, flush=True)


def checkpoint_of(source: str, say=note) -> str:
    """Return the newest whole checkpoint of a run's directory, and say which; else the source.

    CheckpointError where a run has none yet.
    """
    try:
        steps = run_steps(Path(source))
    except PermissionError as error:
        raise no_permission(error) from error
    if not steps:
        return str(source)
    # The newest first; where a run was killed while it saved, that one is torn.
    for step in reversed(steps):
        # A step that keeps its trainer/ no more has been whole.
        without_state = (step / "config.json").is_file() and not (step / "trainer").exists()
        if without_state or missing_file(step) is None:
            say(f"{source}: a run; its newest whole checkpoint is {step.name}")
            return str(step)
    raise CheckpointError(
        f"{source}: a run without a whole checkpoint ({steps[-1].name} lacks"
        f" {missing_file(steps[-1])})"
    )


def run_steps(directory: Path) -> list[Path]:
    """List the step folders of a run's directory, in order; [] for any other, or a checkpoint."""
    if not directory.is_dir():
        return []
    steps = sorted(directory.glob("step-*[0-9]"))
    # A run's own config.json says nothing of a model.
    config = directory / "config.json"
    if steps and config.is_file() and "model_type" in read_json(config):
        return []
    return steps


def missing_file(checkpoint: Path) -> str | None:
    """Return what a run's step lacks to go on from: its files and sizes are on record in it."""
    try:
        state = json.loads((checkpoint / "trainer" / "state.json").read_text())
        # By size alone: to hash gigabytes at every start would take longer than to load them.
        for name, size in state["files"].items():
            if (checkpoint / name).stat().st_size != size:
                return name
    except PermissionError as error:
        raise no_permission(error) from error
    except OSError as error:
        return error.filename
    except (ValueError, KeyError, TypeError, AttributeError):
        return "trainer/state.json"
    return None


def check_readable(directory: Path) -> None:
    """Name a file that this user may not read: the libraries would call it missing."""
    try:
        for path in directory.iterdir():
            if path.is_file():
                path.open("rb").close()
    except PermissionError as error:
        raise no_permission(error) from error


def no_permission(error: PermissionError) -> CheckpointError:
    """Return the words for a file or folder that this user may not read."""
    return CheckpointError(
        f"{error.filename}: no permission to read it; its owner can give it with chmod -R a+rX"
    )


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
    # Before config.json is looked for: an adapter's folder has none, and deserves its own words.
    check_adapter(directory)
    if not path.is_file():
        # A trainer's folder of checkpoints, or the hub's of snapshots.
        inside = [*directory.glob("*/config.json"), *directory.glob("*/*/config.json")]
        # Of several the one written last, which is what is mostly meant.
        newest = max(inside, key=lambda path: path.stat().st_mtime, default=None)
        hint = f"; did you mean {newest.parent}?" if newest else ""
        raise CheckpointError(
            f"{directory}: no config.json, so no checkpoint in the Hugging Face layout{hint}"
        )
    # transformers would quantise even whole weights by it.
    quantised = read_json(path).get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown method")
        raise CheckpointError(
            f"{path}: quantization_config ({method}), and quantised weights don't load;"
            " take the checkpoint that they were made from"
        )
    try:
        # Before transformers, which knows of some only that it doesn't know them.
        check_family(str(read_json(path).get("model_type")))
        config = AutoConfig.from_pretrained(directory)
        DecoderSizes.of(config)
    except (KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: no {error} in it; copy the original config.json") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: {str(error).strip().splitlines()[0]}") from error
    return config


def check_adapter(directory: Path) -> None:
    """Refuse an adapter, alone or beside a model: transformers would load it, too."""
    path = directory / "adapter_config.json"
    if not path.is_file():
        return
    base = read_json(path).get("base_model_name_or_path")
    raise CheckpointError(
        f"{path}: an adapter (of {base}), and adapters don't load; merge it into its base"
        " (peft: merge_and_unload, save_pretrained), or remove it from a merged model"
    )


def image_settings(directory: Path) -> list[tuple[Path, dict, dict]]:
    """Find the image processor's settings: (file, its content, the part of it that they are).

    There may be two such files, of which transformers reads the last; it nests them.
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
    return [(path, content, settings) for path, content, settings in found if settings is not None]


def read_image_processor(directory: Path) -> Qwen2VLImageProcessorPil:
    """Read transformers' image processor; CheckpointError for settings that it can't work with."""
    # To name the one that transformers takes.
    path = image_settings(directory)[-1][0]
    try:
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(directory)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {str(error).strip().splitlines()[0]}") from error
    # transformers says so at the first image only, and in a traceback.
    needed = {
        "size.shortest_edge (or min_pixels)": image_processor.size.shortest_edge,
        "size.longest_edge (or max_pixels)": image_processor.size.longest_edge,
        "rescale_factor": image_processor.rescale_factor,
    }
    if image_processor.do_normalize:
        needed["image_mean"] = image_processor.image_mean
        needed["image_std"] = image_processor.image_std
    for name, value in needed.items():
        if value is None:
            raise CheckpointError(f"{path}: no {name}; copy it from the original checkpoint")
    resample = image_processor.resample
    # transformers takes any text for bilinear.
    if isinstance(resample, str):
        raise CheckpointError(
            f"{path}: resample {resample!r} is no filter's number (3 is bicubic);"
            " copy it from the original checkpoint"
        )
    try:
        side = image_processor.patch_size * image_processor.merge_size
        if image_processor.do_resize:
            side += 1  # what has its size already is not resized
        # Tried out: the settings can be wrong in many ways, which show in use alone.
        image_processor(Image.new("RGB", (side, side)))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path}: {str(error).strip().splitlines()[0]}; copy it from the original checkpoint"
        ) from error
    return image_processor


def check_patches(directory: Path, config) -> None:
    """Compare the image settings, if there are any, with config.json's vision tower."""
    settings = image_settings(directory)
    if not settings:
        return
    image_processor = read_image_processor(directory)
    tower = VisionSizes.of(config)
    sizes = {"patch_size": tower.patch, "merge_size": tower.merge}
    sizes["temporal_patch_size"] = tower.frames
    for name, wanted in sizes.items():
        found = getattr(image_processor, name)
        if found != wanted:
            path = settings[-1][0]
            raise CheckpointError(
                f"{path}: {name} {found}, but config.json's vision tower has {wanted};"
                " copy both from one checkpoint"
            )


def check_files(directory: Path) -> None:
    """Name the file that a tokenizer or image processor lacks.

    Without it transformers makes an empty tokenizer, or explains itself in a paragraph.
    """
    # Each may come in another form.
    names = {path.name for path in directory.iterdir()}
    if {"vocab.json", "merges.txt"} <= names:
        names.add("tokenizer.json")
    if image_settings(directory):
        names.add("preprocessor_config.json")
    for name in ("tokenizer_config.json", "tokenizer.json", "preprocessor_config.json"):
        if name not in names:
            raise CheckpointError(f"{directory}: no {name}; copy it from the original checkpoint")
    for path in (*directory.glob("tokenizer*.json"), *directory.glob("chat_template.json")):
        # Transformers' error on a torn one names no file.
        read_json(path)


# ---- The tokenizer


def read_tokenizer(directory: Path, rows: int, regions: str = "token"):
    """Return the tokenizer with its chat template, and how many rows the embedding has to have.

    rows: those that it has. `<mask>`, which stands for a region, takes the vocabulary's first spare
    row. Where there is none, the embedding has to grow; with regions "text" nobody needs it.
    """
    check_files(directory)
    tokenizer = load_tokenizer(directory)
    known = tokenizer.get_vocab()
    # Its embedding would be an index error in the middle of a run.
    if max(known.values()) >= rows:
        raise CheckpointError(
            f"{directory}: {max(known.values()) + 1} tokens, but {rows} embeddings;"
            " take tokenizer and weights from one checkpoint"
        )
    mask = AddedToken("<mask>", special=True, normalized=False)
    tokenizer.add_tokens([mask], special_tokens=True)
    # Published checkpoints have hundreds of rows to spare; some were cut to their vocabulary.
    if tokenizer.convert_tokens_to_ids("<mask>") >= rows:
        if regions == "text":
            tokenizer = load_tokenizer(directory)
        else:
            # Not by one row: the head's product is fastest where its width divides by 64.
            rows = (rows // ROW_MULTIPLE + 1) * ROW_MULTIPLE
    tokenizer.chat_template = read_chat_template(directory, tokenizer.chat_template)
    return tokenizer, rows


def load_tokenizer(directory: Path):
    """Return transformers' tokenizer, which cuts text as its family does in every version."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # what the libraries raise on bad files has no common type
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(
            f"{directory}: its tokenizer can't be read ({reason}); copy tokenizer.json and"
            " tokenizer_config.json from the original checkpoint"
        ) from error
    family = FAMILIES.get(read_json(directory / "config.json").get("model_type"))
    if family is not None and family.pretokenizer is not None:
        # Some versions of transformers replace what tokenizer.json says: ids would differ by
        # version.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer(family.pretokenizer)
    return tokenizer


def pre_tokenizer(pieces: str) -> pre_tokenizers.PreTokenizer:
    """Return what cuts text where a regular expression says, for byte-level BPE within pieces."""
    # BPE never merges across the edge of a piece, so that the pieces are part of the vocabulary.
    split = pre_tokenizers.Split(Regex(pieces), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])


def rows_for_regions(directory: Path, rows: int, regions: str) -> int:
    """Return how many rows the embedding has to have; as it is where no tokenizer fits it."""
    if regions == "text":
        return rows
    with suppress(CheckpointError):
        # A checkpoint without a tokenizer can still be loaded, trained on ids and saved.
        _, rows = read_tokenizer(directory, rows, regions)
    return rows


def read_chat_template(directory: Path, own: str | dict | None) -> str | dict[str, str]:
    """Return the chat template that transformers' processor takes, or several by name.

    It is processor_config.json's, else chat_template.json's, else chat_template.jinja and what is
    in additional_chat_templates/; and only where there is none of these, the tokenizer's `own`.
    """
    template = processor_template(directory)
    if template is None:
        template = own
    if isinstance(template, str) and isinstance(own, dict):
        # The tokenizer's others are for those who ask for them by name.
        template = own | {"default": template}
    default = template
    if isinstance(template, dict):
        default = template.get("default")
        if default is None:
            names = ", ".join(template)
            raise CheckpointError(f"{directory}: chat templates {names}, and none named default")
    if default is not None and not isinstance(default, str):
        kind = type(default).__name__
        raise CheckpointError(f"{directory}: its chat template is a {kind}, and no text")
    if default is None or not default.strip():
        raise CheckpointError(f"{directory}: no chat_template.jinja, nor an older form of it")
    return template


def processor_template(directory: Path) -> str | dict[str, str] | None:
    """Return what transformers' processor takes for its chat template, but for the tokenizer's."""
    # The rule is theirs, so that it is asked rather than written down again.
    try:
        settings, _ = ProcessorMixin.get_processor_dict(directory)
    except KeyError as error:
        raise CheckpointError(f"{directory / 'chat_template.json'}: no {error} in it") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{directory}: {str(error).strip().splitlines()[0]}") from error
    return settings.get("chat_template")


def save_tokenizer(tokenizer, directory: Path) -> None:
    """Write the tokenizer into a copy of the checkpoint's files, with the template that was used.

    It goes into chat_template.jinja, so that whoever reads the folder finds the same one.
    """
    # transformers refuses several templates in files beside a chat_template.json.
    is_legacy = (directory / "chat_template.json").is_file()
    several = isinstance(tokenizer.chat_template, dict)
    tokenizer.save_pretrained(directory, save_jinja_files=not (is_legacy and several))


def set_vocab_size(directory: Path, rows: int) -> None:
    """Let config.json follow an embedding that has grown, wherever it states the number."""
    path = directory / "config.json"
    config = read_json(path)
    # Flat files have it at the top, nested ones in text_config, some in both.
    config.get("text_config", config)["vocab_size"] = rows
    if "vocab_size" in config:
        config["vocab_size"] = rows
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
    # The one folder that transformers reads.
    if (source / TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / TEMPLATE_FOLDER, directory / TEMPLATE_FOLDER, dirs_exist_ok=True)
