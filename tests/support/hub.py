"""A tiny checkpoint in the files in which the hub has each family, and transformers' own processor
of a folder."""

import json
import shutil
from pathlib import Path
from unittest import mock

from safetensors.torch import load_file, save_file
from tiny_checkpoint import checkpoint
from transformers import AutoProcessor, ProcessorMixin
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

# What tokenizer_config.json of Qwen2.5-VL has: turns of text, glued together.
TEXT_ONLY = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# The files of the published folders, beside weights, README.md, LICENSE and .gitattributes.
COMMON = {
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
}
PUBLISHED = {
    "qwen2_vl": COMMON,
    "qwen2_5_vl": COMMON,
    "qwen3_vl": COMMON | {"video_preprocessor_config.json"},
}


def published(family: str, folder: Path) -> Path:
    """Lay the tiny checkpoint out as the hub has its family, in two shards."""
    shutil.copytree(checkpoint(family), folder)
    (folder / "spatial.safetensors").unlink()
    split_weights(folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    own = TEXT_ONLY if family == "qwen2_5_vl" else template
    edit_json(folder / "tokenizer_config.json", chat_template=own)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    merges = [" ".join(merge) for merge in tokenizer["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = json.loads((folder / "config.json").read_text())
    if family == "qwen3_vl":
        images = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "video_preprocessor_config.json").write_text(json.dumps(images))
    else:
        # Flat: the decoder's sizes stand at the top.
        config = config.pop("text_config") | config
        config["model_type"] = family
    (folder / "config.json").write_text(json.dumps(config))
    assert {path.name for path in folder.iterdir() if path.suffix != ".safetensors"} == PUBLISHED[
        family
    ]
    return folder


def split_weights(folder: Path) -> None:
    """Put the weights into two shards with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places = {}
    for k, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{k}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_json(path: Path, **changes) -> None:
    """Change entries of a JSON file, which need not exist; None takes one away."""
    values = json.loads(path.read_text()) if path.exists() else {}
    values |= changes
    path.write_text(json.dumps({key: v for key, v in values.items() if v is not None}))


def transformers_processor(folder: Path):
    """transformers' AutoProcessor; its part for videos, which needs torchvision, is left out."""
    check = ProcessorMixin.check_argument_for_proper_class

    def check_all_but_videos(self, name, argument):
        if name != "video_processor":
            check(self, name, argument)

    with (
        mock.patch.object(AutoVideoProcessor, "from_pretrained", lambda *_, **__: None),
        mock.patch.object(ProcessorMixin, "check_argument_for_proper_class", check_all_but_videos),
    ):
        return AutoProcessor.from_pretrained(folder)
