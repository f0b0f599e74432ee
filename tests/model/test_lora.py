"""LoRA: silent at first, exactly mergeable, exactly removable, and nothing else learns."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import inputs, make, reference_logits
from transformers import AutoModelForImageTextToText

from errors import UserError
from model.delta import IN_FP32
from model.lora import PROJECTIONS, SCALE, LoRALinear, adapters, add_adapter, attach, merge, off
from model.processor import Processor
from model.qwen_vl import QwenVL
from model.rollout import generate
from model.tiny import write
from srreal import Example
from training.optim import Optimizer

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    make(request.param, tied=request.param == "qwen3_vl").save_pretrained(path)
    return path


def stirred(model, seed=1):
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in adapters(model):
            one.lora_b.copy_(torch.randn(one.lora_b.shape, generator=generator) * 0.05)
    return model


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_silent_at_the_start_and_base_when_off(checkpoint):
    base, model, batch = (
        QwenVL.from_pretrained(checkpoint),
        QwenVL.from_pretrained(checkpoint),
        inputs(),
    )
    attach(model, 3)
    assert torch.equal(model.logits(**batch), base.logits(**batch))
    stirred(model)
    loud = model.logits(**batch)
    assert (loud - base.logits(**batch)).abs().max() > 1e-2
    with off(model):
        assert torch.equal(model.logits(**batch), base.logits(**batch))
    assert torch.equal(model.logits(**batch), loud)


def projections(attends):
    """(block, name) of a layer's adapted projections."""
    names = {"mlp": ("gate_proj", "up_proj", "down_proj")}
    if attends:
        names["self_attn"] = ("q_proj", "k_proj", "v_proj", "o_proj")
    else:
        names["linear_attn"] = ("in_proj_qkv", "in_proj_z", "out_proj")
    return [(block, name) for block, found in names.items() for name in found]


def test_every_projection_of_the_decoder_and_nothing_else(checkpoint):
    base, model = QwenVL.from_pretrained(checkpoint), QwenVL.from_pretrained(checkpoint)
    model.requires_grad_(True)
    attach(model, 2)
    sizes = base.decoder.sizes
    assert len(adapters(model)) == 7 * sizes.attention_layers + 6 * sizes.delta_layers
    new = {n for n, _ in model.named_parameters()} - {n for n, _ in base.named_parameters()}
    assert new == {
        f"decoder.layers.{i}.{block}.{p}.lora_{x}"
        for i in range(len(base.decoder.layers))
        for block, p in projections(attends=sizes.attends[i])
        for x in "ab"
    }
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    other = ("vision.", "region.", "points.", "head3d.")
    assert learns == new | {n for n, _ in base.named_parameters() if n.startswith(other)}
    for one in adapters(model):
        assert one.lora_a.shape == (2, one.weight.shape[1]) and one.lora_b.shape == (
            one.weight.shape[0],
            2,
        )


def test_only_the_adapters_move_in_a_step_and_merging_changes_nothing(checkpoint):
    model, batch = QwenVL.from_pretrained(checkpoint), inputs()
    model.requires_grad_(False)
    attach(model, 4)
    before, optimizer = weights(model), Optimizer(model.named_parameters())
    for _ in range(2):  # in the first B alone has a gradient
        logits_with_gradient(model, batch).float().log_softmax(-1)[..., 5].mean().neg().backward()
        optimizer.step(1e-2, 1.0, 0.0, "step")
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if ".lora_" in n}
    apart = model.logits(**batch)
    base = QwenVL.from_pretrained(checkpoint).logits(**batch)
    together = QwenVL.from_pretrained(checkpoint)
    layer = next(i for i, attends in enumerate(model.decoder.sizes.attends) if attends)
    name = f"decoder.layers.{layer}.self_attn.q_proj.weight"
    wrapped = model.decoder.layers[layer].self_attn.q_proj
    whole = merge(weights(model))
    torch.testing.assert_close(whole[name], before[name] + SCALE * wrapped.lora_b @ wrapped.lora_a)
    together.load_state_dict(whole)
    together = together.logits(**batch)
    assert (apart - base).abs().max() > 1e-2
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if ".lora_" not in n)
    assert torch.equal(model.logits(**batch), apart)


def logits_with_gradient(model, batch):
    return QwenVL.logits.__wrapped__(model, **batch)  # without its no_grad


def test_gradients_equal_those_of_the_whole_weight(checkpoint):
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, where W is the merged weight, in fp64."""
    model = QwenVL.from_pretrained(checkpoint, dtype=torch.float64)
    attach(model, 3)
    stirred(model)
    plain, batch = QwenVL.from_pretrained(checkpoint, dtype=torch.float64), inputs()
    batch["pixel_values"] = batch["pixel_values"].double()
    with torch.no_grad():
        for one, linear in zip(adapters(model), linears(plain), strict=True):
            linear.weight.copy_(one.weight + SCALE * one.lora_b @ one.lora_a)
    for m in (model, plain):
        logits_with_gradient(m, batch).log_softmax(-1)[..., 7].mean().backward()
    for one, linear in zip(adapters(model), linears(plain), strict=True):
        gradient = linear.weight.grad
        torch.testing.assert_close(
            one.lora_b.grad, SCALE * gradient @ one.lora_a.T, atol=1e-12, rtol=1e-6
        )
        torch.testing.assert_close(
            one.lora_a.grad, SCALE * one.lora_b.T @ gradient, atol=1e-12, rtol=1e-6
        )


def linears(model):
    return [
        module
        for name, module in model.decoder.layers.named_modules()
        if name.endswith(PROJECTIONS)
    ]


def test_transformers_loads_the_merged_checkpoint(checkpoint, tmp_path):
    model, batch = QwenVL.from_pretrained(checkpoint), inputs()
    attach(model, 4)
    stirred(model)
    model.save_pretrained(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == load_file(checkpoint / "model.safetensors").keys()
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    keep = batch["attention_mask"].bool()
    assert (reference_logits(theirs, batch) - model.logits(**batch))[keep].abs().max() < 1e-4
    ours = QwenVL.from_pretrained(tmp_path / "out")
    assert (ours.logits(**batch) - model.logits(**batch)).abs().max() < 1e-4


def test_the_state_comes_back_by_full_names(checkpoint):
    """As trainer/ stores it: masters and moments of the adapters alone, onto the base
    checkpoint."""

    def fresh():
        model = QwenVL.from_pretrained(checkpoint)
        model.requires_grad_(False)
        attach(model, 4)
        return model, Optimizer(model.named_parameters())

    (model, optimizer), batch = fresh(), inputs()
    for _ in range(2):
        logits_with_gradient(model, batch)[..., 3].mean().backward()
        optimizer.step(1e-2, 1.0, 0.0, "step")
    from training.optim import KINDS

    state = {kind: {n: t.clone() for n, t in optimizer.state(kind)} for kind in KINDS}
    assert all(".lora_" in name for kind in KINDS for name in state[kind])
    again, other = fresh()
    other.load(lambda kind, name: state[kind][name], optimizer.updates)
    assert torch.equal(again.logits(**batch), model.logits(**batch))


def test_same_start_on_every_rank_and_device_independent(checkpoint):
    a, b, c = (QwenVL.from_pretrained(checkpoint) for _ in range(3))
    attach(a, 3)
    attach(b, 3)
    attach(c, 3, seed=1)
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
    assert not torch.equal(adapters(a)[0].lora_a, adapters(c)[0].lora_a)
    copied = copy.deepcopy(stirred(a))  # as policy.shard makes the copy that rollouts read
    assert torch.equal(copied.logits(**inputs()), a.logits(**inputs()))


def test_a_crash_inside_leaves_the_model_whole(checkpoint):
    model, batch = QwenVL.from_pretrained(checkpoint), inputs()
    attach(model, 3)
    before = stirred(model).logits(**batch)
    with pytest.raises(KeyboardInterrupt), off(model):
        raise KeyboardInterrupt
    assert torch.equal(model.logits(**batch), before)


def test_bf16_adapters_have_the_weights_dtype(checkpoint):
    model = QwenVL.from_pretrained(checkpoint, dtype=torch.bfloat16)
    attach(model, 3)
    # A delta net's decays stay in fp32.
    kept = [p for n, p in model.named_parameters() if not n.endswith(IN_FP32)]
    assert {p.dtype for p in kept} == {torch.bfloat16}
    one = stirred(model) and adapters(model)[0]
    wide = one.weight.double() + SCALE * one.lora_b.double() @ one.lora_a.double()
    whole = add_adapter(one.weight, one.lora_a, one.lora_b)
    assert torch.equal(whole, wide.to(torch.bfloat16)) or (whole - wide).abs().max() < 2e-3


def test_bad_ranks_and_a_second_time(checkpoint):
    model = QwenVL.from_pretrained(checkpoint)
    with pytest.raises(UserError, match="--lora 0"):
        attach(model, 0)
    attach(model, 1)
    with pytest.raises(ValueError, match="wrapped once"):
        attach(model, 1)
    plain = QwenVL.from_pretrained(checkpoint)
    with off(plain):
        pass  # without adapters nothing happens
    assert all(torch.equal(p, merge(weights(plain))[n]) for n, p in plain.named_parameters())


def test_generate_samples_from_the_adapted_model(tmp_path):
    write("qwen3_vl", str(tmp_path), seed=1)
    processor = Processor.from_pretrained(tmp_path)
    examples = [Example("e", "lor", [], "Where is the chair?", "A")]
    model, changed = QwenVL.from_pretrained(tmp_path), QwenVL.from_pretrained(tmp_path)
    base = generate(model, processor, examples, n=2, max_new_tokens=16, seed=3)
    attach(model, 4)
    assert [
        r.tokens for r in generate(model, processor, examples, n=2, max_new_tokens=16, seed=3)[0]
    ] == [r.tokens for r in base[0]]
    stirred(model)
    with torch.no_grad():
        for one, linear in zip(adapters(model), linears(changed), strict=True):
            assert isinstance(one, LoRALinear)
            linear.weight.copy_(add_adapter(one.weight, one.lora_a, one.lora_b))
    apart = generate(model, processor, examples, n=2, max_new_tokens=16, seed=3)
    wanted = generate(changed, processor, examples, n=2, max_new_tokens=16, seed=3)
    assert (
        max(abs(a - b) for a, b in zip(wanted[0][0].logprobs, base[0][0].logprobs, strict=True))
        > 0.02
    )
    assert [r.tokens for r in apart[0]] == [r.tokens for r in wanted[0]]
    assert apart[0][0].logprobs == pytest.approx(wanted[0][0].logprobs, abs=1e-4)
