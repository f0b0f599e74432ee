"""Qwen3.5: gated delta nets against transformers, packed without leaks, with shared prompts.

Other codebases' leaks, each a test here: ms-swift#9565, slime#1686, lmms-engine#167, NeMo
Automodel#2147, transformers#46093.
"""

import pytest
import torch
from published_sizes import published
from safetensors.torch import load_file
from tiny_models import make_qwen3_5
from transformers import AutoConfig

from model.batch import Batch
from model.delta import Walk
from model.qwen_vl import QwenVL


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


def test_layers_without_a_list_attend_every_fourth():

    text = AutoConfig.for_model(**published()["Qwen3.5-0.8B"]).text_config
    assert [kind == "full_attention" for kind in text.layer_types] == [
        False,
        False,
        False,
        True,
    ] * 6
