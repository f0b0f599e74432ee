"""Rows longer than a checkpoint's max_position_embeddings are named before anything is trained."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import FAMILIES, checkpoint

import data
import eval as evaluation
import train_rl
import train_sft
from errors import UserError
from model.processor import Processor
from srreal import Example
from training.lengths import bound, too_long


def examples() -> list[Example]:
    ask = "Which of 红框 <mask> and the <mask> is nearer?"
    found = []
    for size in ((64, 48), (500, 333), (90, 1200)):
        images = [Image.new("RGB", size)] * 2
        regions = [(0, (1.0, 2.0, 30.0, 40.0)), (1, (5.5, 2.0, 60.0, 40.0))]
        found.append(Example(str(size), "dtr", images, ask, "A", regions=regions))
        found.append(Example(f"{size} bare", "direct", images[:1], "What?", "A"))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("regions", ["token", "text"])
def test_lengths_are_those_of_the_prompts_without_decoding(family, regions, monkeypatch):
    processor = Processor.from_pretrained(checkpoint(family), regions=regions)
    asked = examples()
    wanted = [len(processor.prompt_ids(example)) for example in asked]

    def fail(source):
        raise AssertionError("decoded")

    monkeypatch.setattr("model.images.read_picture", fail)
    for example, length in zip(asked, wanted, strict=True):
        sizes = [image.size for image in example.images]
        assert processor.prompt_length(example, sizes) == length
        assert bound(processor, example, "", sizes) >= length
    limit = sorted(wanted)[-2]
    processor.config.get_text_config().max_position_embeddings = limit
    reason = too_long(processor, asked, with_target=False)
    assert f"{max(wanted)} tokens" in reason and f"is {limit};" in reason
    assert "1 of 6 rows" in reason and str(asked[wanted.index(max(wanted))].id) in reason
    processor.config.get_text_config().max_position_embeddings = max(wanted)
    assert too_long(processor, asked, with_target=False) is None


def test_the_answer_counts_in_sft():
    processor = Processor.from_pretrained(checkpoint("qwen2_5_vl"))
    example = examples()[1]
    length = len(processor.prompt_ids(example)) + len(processor.target_ids(example))
    config = processor.config.get_text_config()
    config.max_position_embeddings = length
    assert too_long(processor, [example], with_target=True) is None
    config.max_position_embeddings = length - 1
    assert f"{length} tokens" in too_long(processor, [example], with_target=True)
    assert too_long(processor, [example], with_target=False) is None


@pytest.fixture
def short(tmp_path):
    """A checkpoint of few positions, a set with a prompt that is longer, and its length."""
    model = tmp_path / "model"
    shutil.copytree(checkpoint("qwen2_5_vl"), model)
    rows = []
    for name, side in (("small", 64), ("large", 400)):
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(tmp_path / f"{name}.png")
        row = {"id": name, "path": "direct", "images": [f"{name}.png"], "question": "What?"}
        rows.append(json.dumps(row | {"answer": "A"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (large,) = [example for example in data.load([tmp_path]) if example.id == "large"]
    length = len(Processor.from_pretrained(model).prompt_ids(large))
    config = json.loads((model / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        if "max_position_embeddings" in part:
            part["max_position_embeddings"] = length - 1
    (model / "config.json").write_text(json.dumps(config))
    return tmp_path, length


@pytest.mark.parametrize("script", [train_sft, train_rl])
def test_both_scripts_refuse_before_training(short, script):
    folder, length = short
    config = script.Config(
        model=str(folder / "model"), data=(str(folder),), out=str(folder / "out"), steps=2
    )
    said = rf"large: \d+ tokens.*max_position_embeddings is {length - 1}; 1 of 2 rows"
    with pytest.raises(UserError, match=said) as error:
        script.main(config)
    # In SFT the answer and the end of its turn count.
    counted = int(str(error.value).split()[1])
    assert length <= counted <= length + 4
    assert not list((folder / "out").glob("step-*"))


def test_eval_says_so_and_goes_on(short, capsys):
    folder, length = short
    config = evaluation.Config(
        model=str(folder / "model"),
        data=(str(folder),),
        out=str(folder / "eval"),
        path="direct",
        max_new_tokens=2,
    )
    evaluation.main(config)
    said = capsys.readouterr().err
    assert said.count(f"warning: large: a prompt of {length} tokens") == 1
    assert f"max_position_embeddings is {length - 1}" in said
