"""Qwen3.5: gated delta nets against transformers, packed without leaks, with shared prompts."""

import json
import shutil

import pytest
import torch
from hub import edit_json
from published_sizes import published
from safetensors.torch import load_file, save_file
from tiny_checkpoint import checkpoint
from tiny_models import inputs, make_qwen3_5, reference_logits
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen3_5ForConditionalGeneration,
)

from kernels.delta_rule import Chunks
from model.batch import Batch
from model.delta import Walk
from model.files import CheckpointError
from model.processor import Processor
from model.qwen_vl import QwenVL
from srreal import Example


def load(reference, folder, dtype=None) -> QwenVL:
    reference.save_pretrained(folder)
    return QwenVL.from_pretrained(str(folder), dtype=dtype)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(make_qwen3_5(), tmp_path_factory.mktemp("qwen3_5"))


def tokens(count, seed=0):
    return torch.randint(3, 290, (count,), generator=torch.Generator().manual_seed(seed))


def packed(pieces, targets=None) -> Batch:
    """pieces: (ids, first position, prefix segment or None), one behind the other.

    targets: the pieces that are completions, each predicted from its prefix's last token on.
    """
    segments = []
    positions = []
    predict_from = []
    at = 0
    for i, (ids, first, prefix) in enumerate(pieces):
        before = (0, 0) if prefix is None else segments[prefix][:2]
        segments.append((at, at + len(ids), *before))
        positions.append(torch.arange(first, first + len(ids)))
        if targets is not None and i in targets:
            predict_from += [before[1] - 1, *range(at, at + len(ids) - 1)]
        at += len(ids)
    chosen = [pieces[i][0] for i in targets or ()]
    return Batch(
        input_ids=torch.cat([ids for ids, _, _ in pieces]),
        position_ids=torch.cat(positions).expand(3, -1),
        segments=segments,
        predict_from=torch.tensor(predict_from, dtype=torch.int64),
        targets=torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.int64),
    )


@pytest.mark.parametrize("heads", [(2, 2), (2, 4), (2, 6), (1, 4)])
def test_several_chunks_and_every_ratio_of_heads(heads, tmp_path):
    reference = make_qwen3_5(1, key_heads=heads[0], value_heads=heads[1])
    ours = load(reference, tmp_path)
    for length in (1, 2, 64, 65, 201):
        ids = tokens(length)[None]
        with torch.no_grad():
            expected = reference(input_ids=ids).logits
        assert (ours.logits(ids) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "prompt, completions",
    [(150, (1, 2, 69, 70, 64)), (1, (3, 1)), (2, (5, 70)), (64, (1,)), (65, (64, 2))],
)
def test_a_shared_prompt_equals_whole_sequences(model, prompt, completions):
    """Log-probs, and the gradients of all parameters: through the state and the last rows."""
    start = tokens(prompt)
    ends = [tokens(length, seed=1 + i) for i, length in enumerate(completions)]
    weight = torch.linspace(0.5, 1.5, sum(completions))

    # Behind a sequence of its own, which nothing of the group may read.
    shared = [(tokens(17, seed=99), 0, None), (start, 0, None)]
    shared += [(ids, prompt, 1) for ids in ends]
    together = packed(shared, targets=range(2, len(shared)))
    apart = Batch(**vars(packed([(torch.cat((start, ids)), 0, None) for ids in ends])))
    predict_from = []
    for (begin, end, _, _), ids in zip(apart.segments, ends, strict=True):
        predict_from += range(end - len(ids) - 1, end - 1)
        assert end - begin == prompt + len(ids)
    apart.predict_from = torch.tensor(predict_from)
    apart.targets = torch.cat(ends)

    results = []
    for batch in (together, apart):
        model.zero_grad()
        out = model(batch)
        (out.logprob * weight).sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((out.logprob.detach(), grads))
    (logprob, grads), (expected, expected_grads) = results
    assert (logprob - expected).abs().max() < 1e-5
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        error = (grad - expected_grads[name]).norm() / expected_grads[name].norm().clamp(min=1e-6)
        assert error < 1e-3, name


def test_no_state_crosses_between_packed_sequences(model):
    """Neither values nor gradients: exactly, whatever stands before."""
    second = tokens(70, seed=5)
    seen = []
    for seed in (1, 2):
        batch = packed([(tokens(80, seed=seed), 0, None), (second, 0, None)])
        seen.append(model.hidden(batch)[80:])
    assert torch.equal(*seen)

    inputs = []
    hook = model.decoder.embed_tokens.register_forward_hook(
        lambda module, args, out: inputs.append(out.detach().requires_grad_()) or inputs[-1]
    )
    hidden = model.hidden(packed([(tokens(80), 0, None), (second, 0, None)]))
    hook.remove()
    (grad,) = torch.autograd.grad(hidden[80:].square().sum(), inputs)
    assert (grad[:80] == 0).all() and (grad[80:] != 0).any(dim=1).all()


LEAKS = {
    "ms-swift#9565: the boundaries got lost": ("conv", "rule"),
    "transformers#46093: position_ids alone don't separate": ("conv", "rule"),
    "slime#1686: the convolution knew them, the rule didn't": ("rule",),
    "lmms-engine#167: seq_idx wasn't passed to the convolution": ("conv",),
    "NeMo Automodel#2147: a layer saw one sequence": ("conv", "rule"),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_each_leak_of_others_would_show(leak, model, monkeypatch):
    """What these let cross the boundary, put back one by one, moves the second sequence."""
    second = tokens(70, seed=5)

    def hidden(seed):
        return model.hidden(packed([(tokens(80, seed=seed), 0, None), (second, 0, None)]))[80:]

    assert torch.equal(hidden(1), hidden(2))
    if "conv" in LEAKS[leak]:
        monkeypatch.setattr(Walk, "before", property(lambda walk: torch.arange(150)))
    if "rule" in LEAKS[leak]:
        one = Chunks([150], torch.device("cpu"))
        monkeypatch.setattr(Walk, "root_chunks", property(lambda walk: one))
    assert (hidden(1) - hidden(2)).abs().max() > 0.01


def test_a_completion_reads_its_prompt_and_no_other_completion(model):
    pieces = [(tokens(9), 0, None), (tokens(5, 1), 9, 0), (tokens(70, 2), 9, 0)]
    alone = model.hidden(packed([pieces[0], pieces[2]]))[9:]
    beside = model.hidden(packed(pieces))[14:]
    torch.testing.assert_close(alone, beside, rtol=0, atol=1e-5)
    other_prompt = [(tokens(9, 7), 0, None), *pieces[1:]]
    assert not torch.allclose(model.hidden(packed(other_prompt))[14:], beside, atol=1e-3)


def test_a_prefix_is_a_whole_segment():
    with pytest.raises(ValueError, match="prefix 0:5 is no whole segment"):
        _ = Walk([(0, 9, 0, 0), (9, 12, 0, 5)], 4, torch.device("cpu"))


def test_decays_stay_in_fp32(tmp_path):
    """In a bf16 model too; a save writes the dtypes of the files, F32 to the bit."""
    reference = make_qwen3_5().to(torch.bfloat16)
    for name, p in reference.named_parameters():
        if name.endswith(("A_log", "linear_attn.norm.weight")):
            p.data = p.data.float() + 1e-4
    model = load(reference, tmp_path / "a")
    assert model.dtype == torch.bfloat16
    wide = [name for name, p in model.named_parameters() if p.dtype == torch.float32]
    assert len(wide) == 6 and all("linear_attn" in name for name in wide)
    model.save_pretrained(tmp_path / "b")
    saved = load_file(tmp_path / "b/model.safetensors")
    for name, tensor in load_file(tmp_path / "a/model.safetensors").items():
        assert saved[name].dtype == tensor.dtype and torch.equal(saved[name], tensor), name


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(output_gate_type="sigmoid"), "output_gate_type 'sigmoid'"),
        (dict(attn_output_gate=False), "attn_output_gate False"),
        (dict(attention_bias=True), "attention_bias True"),
        (dict(layer_types=["sliding_attention"] * 4), "layer_types sliding_attention"),
        (
            dict(
                rope_parameters=dict(
                    rope_type="default",
                    rope_theta=1e4,
                    mrope_section=[3, 2, 2],
                    partial_rotary_factor=0.5,
                )
            ),
            "mrope_section",
        ),
    ],
)
def test_what_is_refused_by_name(change, words):
    config = make_qwen3_5().config
    for name, value in change.items():
        setattr(config.text_config, name, value)
    with pytest.raises(ValueError, match=words):
        QwenVL(config)


@pytest.mark.parametrize("head_dim", [24, 96, 256])
def test_sections_that_are_missing_are_transformers(head_dim, tmp_path):
    """It takes [11, 11, 10], cut where a head has fewer frequencies; images turn by all three."""
    torch.manual_seed(0)
    config = make_qwen3_5().config
    config.text_config.head_dim = head_dim
    config.text_config.rope_parameters = dict(
        rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25
    )
    reference = Qwen3_5ForConditionalGeneration(config).eval()
    ours = load(reference, tmp_path)
    batch = inputs("left")
    keep = batch["attention_mask"].bool()
    expected = reference_logits(reference, batch)
    assert (ours.logits(**batch) - expected)[keep].abs().max() < 1e-4


def test_layers_without_a_list_attend_every_fourth():

    text = AutoConfig.for_model(**published()["Qwen3.5-0.8B"]).text_config
    assert [kind == "full_attention" for kind in text.layer_types] == [
        False,
        False,
        False,
        True,
    ] * 6


# ---- Files


def carrying(folder, source):
    """A copy of a checkpoint with a head for several tokens at once, as published ones have."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    weights["mtp.fc.weight"] = torch.randn(8, 16).to(torch.bfloat16)
    weights["mtp.norm.weight"] = torch.randn(8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return {name: weights[name] for name in ("mtp.fc.weight", "mtp.norm.weight")}


def test_the_head_for_several_tokens_is_carried_through(tmp_path, capsys):
    """It isn't loaded, isn't spoken of, and comes out with its bytes and dtypes; twice over."""
    kept = carrying(tmp_path / "a", checkpoint("qwen3_5"))
    for source, target in (("a", "b"), ("b", "c")):
        model = QwenVL.from_pretrained(str(tmp_path / source))
        assert not any("mtp" in name for name, _ in model.named_parameters())
        model.save_pretrained(tmp_path / target)
    saved = load_file(tmp_path / "c/model.safetensors")
    for name, tensor in kept.items():
        assert saved[name].dtype == tensor.dtype and torch.equal(saved[name], tensor)
    assert "mtp" not in capsys.readouterr().err
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "c")
    ids = tokens(20)[None]
    ours = QwenVL.from_pretrained(str(tmp_path / "c"))
    with torch.no_grad():
        assert (theirs(input_ids=ids).logits - ours.logits(ids)).abs().max() < 1e-4


def test_a_single_file_may_be_called_a_shard(tmp_path):
    """As 2B-Base is published: a save leaves no stale file of that name."""
    name = "model.safetensors-00001-of-00001.safetensors"
    folder = tmp_path / "a"
    shutil.copytree(checkpoint("qwen3_5"), folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    QwenVL.from_pretrained(str(folder)).save_pretrained(folder)
    assert not (folder / name).exists() and not (folder / "model.safetensors.index.json").exists()
    QwenVL.from_pretrained(str(folder))


TAILS = {
    "0.8B": "<think>\n\n</think>\n\n",
    "4B": "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}",
    "always open": "<think>\n",
    "none": "",
}


def test_prompts_of_all_templates_are_one(tmp_path):
    """With an empty block, an open one, one that a switch empties, and none."""
    e = Example("e", "lor", [], "How far is it?", "1.0")
    prompts = []
    for name, tail in TAILS.items():
        folder = tmp_path / name
        shutil.copytree(checkpoint("qwen3_5"), folder)
        template = (folder / "chat_template.jinja").read_text()
        text = template.replace("assistant\n'", "assistant\n' }}" + tail + "{{ ''")
        (folder / "chat_template.jinja").write_text(text)
        processor = Processor.from_pretrained(folder)
        prompts.append(list(processor.prompt_ids(e)))
        assert processor.decode(prompts[-1]).endswith("<|im_start|>assistant\n")
    assert all(ids == prompts[0] for ids in prompts)


def test_words_with_combining_marks_are_cut_as_published(tmp_path):
    """Also where tokenizer.json and tokenizer_config.json say that they are Qwen2's."""
    folder = tmp_path / "m"
    shutil.copytree(checkpoint("qwen3_5"), folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    (split, _) = tokenizer["pre_tokenizer"]["pretokenizers"]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"[\p{L}\p{M}]", r"\p{L}")
    path.write_text(json.dumps(tokenizer))
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    word = "हिन्दी"
    cut = Processor.from_pretrained(folder).tokenizer.backend_tokenizer.pre_tokenizer
    assert len(cut.pre_tokenize_str(word)) == 1
    expected = Processor.from_pretrained(checkpoint("qwen3_5"))
    assert Processor.from_pretrained(folder).encode(word).tolist() == expected.encode(word).tolist()


def test_a_turn_ends_without_a_generation_config(tmp_path):
    """config.json's own eos is <|endoftext|>, which never ends a turn."""
    folder = tmp_path / "m"
    shutil.copytree(checkpoint("qwen3_5"), folder)
    (folder / "generation_config.json").unlink()
    edit_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    processor = Processor.from_pretrained(folder)
    vocab = processor.tokenizer.get_vocab()
    assert set(processor.end_ids) == {vocab["<|endoftext|>"], vocab["<|im_end|>"]}
    assert processor.end_id == vocab["<|im_end|>"]


@pytest.mark.parametrize(
    "model_type, reason",
    [
        ("qwen3_5_moe", "mixture of experts"),
        ("qwen4_exp", "hyper-connections"),
        ("llama", "this is for"),
    ],
)
def test_relatives_are_refused_with_the_reason(model_type, reason, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(checkpoint("qwen3_5"), folder)
    edit_json(folder / "config.json", model_type=model_type)
    with pytest.raises(CheckpointError, match=f"'{model_type}' is not supported: .*{reason}"):
        QwenVL.from_pretrained(str(folder))


def test_a_segment_leaves_the_last_rows_of_its_sequence():
    """Also those of its prefix, where it has fewer tokens than the convolution reads."""
    # A prompt, another, and a continuation of one token of the first.
    segments = [(0, 5, 0, 0), (5, 7, 0, 0), (7, 8, 0, 5)]
    index, there = Walk(segments, 4, torch.device("cpu")).tails
    # Row t % 4 of token t, counted from behind: 1, 2 and 3 back are rows 3, 2 and 1.
    assert index[:, 1:].tolist() == [[2, 3, 4], [0, 5, 6], [3, 4, 7]]
    assert there[:, 1:].tolist() == [[True] * 3, [False, True, True], [True] * 3]
