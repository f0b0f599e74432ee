"""Sampling against transformers' generate, and what it promises: groups, batches and order change
nothing."""

import copy
import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from commands import ROOT
from PIL import Image
from transformers import AutoModelForImageTextToText

import train_rl
from model import lora
from model.images import DeviceImages
from model.processor import Processor
from model.qwen_vl import QwenVL, fuse_linears, fused_linears, input_projections
from model.rollout import Engine, generate, predict_centres, sample_groups
from model.rollout.cache import Options, PromptRows, token_bytes
from model.rollout.cpu import joint_linear
from model.rollout.decode import FusedLayer, ModelRunner
from model.rollout.scheduler import Scheduler
from model.rollout.slots import HostState, take_ended
from model.tiny import write
from srreal import Example, Scores
from training import policy, ranks, run
from training.optim import Optimizer


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def tiny(request, tmp_path_factory):
    """A tiny checkpoint of each family: our model, its processor, and the directory."""
    path = tmp_path_factory.mktemp(request.param)
    write(request.param, str(path), seed=1)
    return QwenVL.from_pretrained(str(path)), Processor.from_pretrained(str(path)), path


def picture(width: int, height: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(
        0, 255, (height // 8, width // 8, 3), dtype=np.uint8
    )
    return Image.fromarray(noise).resize((width, height))


def tokens_of(groups):
    return [[r.tokens for r in group] for group in groups]


def examples() -> list[Example]:
    """Two images, one image with a region and depth, text only, a long prompt: all of different
    lengths."""
    depth = np.full((96, 128), 2.5, np.float32)
    return [
        Example(
            "two",
            "lor",
            [picture(128, 96, 0), picture(64, 96, 1)],
            "Which of the two is closer?",
            "A",
        ),
        Example(
            "one",
            "dtr",
            [picture(128, 96, 2)],
            "How far is the box (red bbox <mask>)?",
            "2.5",
            depths=[depth],
            intrinsics=[(100.0, 100.0, 63.5, 47.5)],
            regions=[(0, (10, 20, 60, 70))],
        ),
        Example("text", "direct", [], "Say something about chairs.", "chair"),
        Example("long", "lor", [picture(96, 128, 3)], "Is it so? " * 30, "B"),
    ]


def test_greedy_equals_transformers(tiny):
    """Alone, in a group, and in a batch of other lengths and images, in more and in fewer slots
    than work."""
    model, processor, path = tiny
    reference = AutoModelForImageTextToText.from_pretrained(path).eval()
    plain, truth = [e for e in examples() if not e.regions], []
    for example in plain:
        batch = processor([example])
        ids = batch.input_ids[None]
        images = (
            {}
            if batch.pixel_values is None
            else dict(
                pixel_values=batch.pixel_values,
                image_grid_thw=batch.image_grid_thw,
                mm_token_type_ids=(ids == processor.image_token_id).int(),
            )
        )
        out = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            suppress_tokens=processor.banned.nonzero()[:, 0].tolist(),
            **images,
        )
        truth.append(out[0, ids.shape[1] :].tolist())
    assert len({tuple(tokens) for tokens in truth}) == len(plain)
    greedy = dict(max_new_tokens=24, temperature=0.0)
    assert [generate(model, processor, [e], **greedy)[0][0].tokens for e in plain] == truth
    assert tokens_of(generate(model, processor, plain[:1], n=5, **greedy)) == [truth[:1] * 5]
    for n, slots in ((1, None), (3, None), (3, 2), (3, 50)):
        groups = generate(model, processor, plain, n=n, slots=slots, **greedy)
        assert tokens_of(groups) == [[tokens] * n for tokens in truth]


def test_the_prompts_images_are_there_for_the_update(tiny):
    model, processor, _ = tiny
    asked, images = examples(), DeviceImages(model.device)
    processor.prefetch(asked)
    shared = list(
        sample_groups(model, processor, asked, n=2, max_new_tokens=3, seed=1, images=images)
    )
    kept = dict(images.uploaded)
    assert len(kept) == 4
    processor(asked, [[[5, 6]]] * len(asked)).to(model.device, images)
    assert images.uploaded.keys() == kept.keys()
    plain = generate(model, processor, asked, n=2, max_new_tokens=3, seed=1)
    assert tokens_of(shared) == tokens_of(plain)


def test_the_step_of_a_gpu(tiny):
    """CUDA's operations (their references here; under TRITON_INTERPRET=1 the kernels) say what a
    CPU's do."""
    model, processor, _ = tiny
    options = dict(n=2, max_new_tokens=3, slots=3)
    ours = generate(model, processor, examples()[1:3], seed=2, **options)
    engine = Engine(model, processor, ModelRunner, **options)
    theirs = list(engine.sample_groups(examples()[1:3], seed=2))
    assert tokens_of(ours) == tokens_of(theirs)
    gaps = zip(
        (r for group in ours for r in group), (r for group in theirs for r in group), strict=True
    )
    assert (
        max(abs(a - b) for x, y in gaps for a, b in zip(x.logprobs, y.logprobs, strict=True)) < 1e-5
    )


def test_logprobs_are_the_trainers(tiny):
    """Sampled log-probs equal a teacher-forced forward: ours, packed behind one prompt, and
    transformers'."""
    model, processor, path = tiny
    batch_of = examples()
    rollouts = generate(model, processor, batch_of, n=3, max_new_tokens=20, temperature=0.7, seed=5)
    batch = processor(batch_of, [[r.tokens for r in group] for group in rollouts])
    output = model(batch, temperature=0.7)
    sampled = torch.tensor([p for group in rollouts for r in group for p in r.logprobs])
    assert (output.logprob - sampled).abs().max() < 1e-4
    assert sampled.max() <= 0
    reference = AutoModelForImageTextToText.from_pretrained(path).eval()
    example, rollout = batch_of[0], rollouts[0][1]
    prompt = processor([example])
    ids = torch.cat((prompt.input_ids, torch.tensor(rollout.tokens)))[None]
    logits = reference(
        input_ids=ids,
        pixel_values=prompt.pixel_values,
        image_grid_thw=prompt.image_grid_thw,
        mm_token_type_ids=(ids == processor.image_token_id).int(),
    ).logits
    logits = logits[0, len(prompt.input_ids) - 1 : -1] / 0.7
    truth = logits.log_softmax(-1).gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
    assert (torch.tensor(rollout.logprobs) - truth).abs().max() < 1e-4


def test_a_sample_depends_on_nothing_but_its_key(tiny):
    model, processor, _ = tiny
    all_of = examples()
    together = generate(model, processor, all_of, n=4, max_new_tokens=12, seed=3)
    backwards = generate(model, processor, all_of[::-1], n=4, max_new_tokens=12, seed=3)[::-1]
    fewer = [generate(model, processor, [e], n=2, max_new_tokens=12, seed=3)[0] for e in all_of]
    waves = generate(model, processor, all_of, n=4, max_new_tokens=12, seed=3, slots=4)
    tokens = [[r.tokens for r in group] for group in together]
    assert tokens == [[r.tokens for r in group] for group in backwards]
    assert tokens == [[r.tokens for r in group] for group in waves]
    assert [group[:2] for group in tokens] == [[r.tokens for r in group] for group in fewer]
    other = generate(model, processor, all_of, n=4, max_new_tokens=12, seed=4)
    renamed = [dataclasses.replace(e, id=e.id + "x") for e in all_of]
    for changed in (other, generate(model, processor, renamed, n=4, max_new_tokens=12, seed=3)):
        assert tokens != [[r.tokens for r in group] for group in changed]
    assert tokens[0][0] != tokens[0][1]


def test_who_is_asked_twice_answers_twice(tiny):
    """The first time as ever, then with other noise, whatever else there is, and in any slot."""
    model, processor, _ = tiny
    one, two = examples()[:2]
    asked = [one, two, one, one]
    options = dict(n=2, max_new_tokens=12, seed=3)
    tokens = tokens_of(generate(model, processor, asked, **options))
    assert tokens[:2] == tokens_of(generate(model, processor, [one, two], **options))
    assert tokens[0] != tokens[2] != tokens[3] != tokens[0]
    waves = generate(model, processor, asked, slots=3, **options)
    assert tokens == tokens_of(waves)
    assert [tokens[i] for i in (0, 2, 3)] == tokens_of(
        generate(model, processor, [one] * 3, **options)
    )
    # The number that a rank is told counts those of the others.
    engine = Engine(model, processor, n=2, max_new_tokens=12)
    alone = engine.sample_groups([one, two], seed=3, occurrence_of=[2, 0])
    assert tokens_of(list(alone)) == [tokens[3], tokens[1]]


def test_end_tokens_length_and_bans(tiny):
    model, processor, _ = tiny
    weight = model.head_weight
    backup = weight.detach().clone()
    image, end = processor.image_token_id, processor.end_ids[0]
    try:
        # a model that wants to say nothing but image placeholders and the end token
        with torch.no_grad():
            weight.zero_()
            hidden = model.hidden(processor(examples()))
            weight[image], weight[end] = hidden.mean(0), hidden.mean(0) * 0.1
        rollouts = generate(model, processor, examples(), n=8, max_new_tokens=40, temperature=0.5)
        tokens = [t for group in rollouts for r in group for t in r.tokens]
        assert not any(bool(processor.banned[t]) for t in tokens)
        for r in (r for group in rollouts for r in group):
            assert len(r.tokens) == len(r.logprobs) <= 40
            assert r.finished == (r.tokens[-1] in processor.end_ids)
            assert not any(t in processor.end_ids for t in r.tokens[:-1])
            assert r.finished or len(r.tokens) == 40
            kept = r.tokens[:-1] if r.finished else r.tokens
            assert r.text == processor.tokenizer.decode(kept, skip_special_tokens=False)
        assert {r.finished for group in rollouts for r in group} == {True, False}
    finally:
        with torch.no_grad():
            weight.copy_(backup)


def test_edges(tiny):
    model, processor, _ = tiny
    assert generate(model, processor, [], n=2) == []
    (group,) = generate(model, processor, examples()[:1], n=2, max_new_tokens=1)
    assert [len(r.tokens) for r in group] == [1, 1]
    stream = sample_groups(model, processor, examples(), n=2, max_new_tokens=2)
    assert sum(len(group) for group in stream) == 8
    assert next(stream, None) is None
    stream.close()
    assert (stream.discarded_samples, stream.discarded_tokens) == (0, 0)


@pytest.mark.parametrize("n", [1, 3])
def test_slots_prefill_budget_and_refills_change_nothing(n, tiny, monkeypatch):
    """Samples of geometric lengths, in fewer slots than a group has, in more than there is work,
    prompt by prompt."""
    model, processor, _ = tiny
    allowed = (~processor.banned).nonzero()[:, 0].tolist()
    monkeypatch.setattr(processor, "end_ids", allowed[::7])
    asked = [dataclasses.replace(e, id=f"{e.id} {i}") for i in range(4 - n) for e in examples()]
    # the long ones come when all slots are busy
    asked.sort(key=lambda e: len(processor.prompt_ids(e)))
    whole = generate(model, processor, asked, n=n, max_new_tokens=20, seed=1, slots=12)
    lengths = {len(r.tokens) for group in whole for r in group}
    assert len(lengths) > 5  # so slots are refilled at different times
    for slots in (2, 5, 1000):
        again = generate(model, processor, asked, n=n, max_new_tokens=20, seed=1, slots=slots)
        assert tokens_of(again) == tokens_of(whole)
    grow, grown = PromptRows.make_room, []
    monkeypatch.setattr(
        PromptRows, "make_room", lambda *args: grown.append(grow(*args)) or grown[-1]
    )
    # Every prompt is longer, so that the room for prompts grows while samples are live.
    tight = dict(prefill_tokens=8, prompt_step=8)
    small = generate(model, processor, asked, n=n, max_new_tokens=20, seed=1, slots=5, **tight)
    assert tokens_of(small) == tokens_of(whole)
    assert all(grown)  # with memory enough nobody waits


@pytest.mark.parametrize("n", [1, 2])
def test_a_long_prompt_waits_for_room(n, tiny, monkeypatch):
    """Rows grow for it and get fewer, so it comes when others have left; the samples are the
    same."""
    model, processor, _ = tiny
    many = [dataclasses.replace(e, id=f"{e.id} {i}") for i in range(3) for e in examples()[2:]]
    whole = generate(model, processor, many, n=n, max_new_tokens=6, seed=1)
    rows, grow = [], PromptRows.make_room

    def listen(self, length):
        grown = grow(self, length)
        rows.append((grown, self.count))
        return grown

    monkeypatch.setattr(PromptRows, "make_room", listen)
    places = max(len(processor.prompt_ids(e)) for e in many) + 6
    tight = dict(prefill_tokens=8, prompt_step=8, cache_bytes=places * token_bytes(model))
    again = generate(model, processor, many, n=n, max_new_tokens=6, seed=1, slots=4, **tight)
    assert tokens_of(again) == tokens_of(whole)
    assert not all(grown for grown, _ in rows) and len({count for _, count in rows}) > 1


def test_samples_are_collected_on_a_gpu_when_it_is_looked_at():
    """A slot is refilled only by flags of a step behind its start; between two looks there are
    none."""
    (sequence,) = Scheduler([Example("a", "direct", [], "?", "")], 1, 0).waiting
    sequence.slot, sequence.started = 0, 8
    state = (
        torch.tensor([True]),
        torch.tensor([2]),
        torch.tensor([[5, 6, 7]]),
        torch.tensor([[-0.5, -1.0, -2.0]]),
    )
    assert take_ended([sequence], state, clock=8) == []  # its predecessor's
    assert take_ended([sequence], state, clock=16) == [sequence]
    assert (sequence.tokens, sequence.logprobs) == ([5, 6], [-0.5, -1.0])
    assert HostState.take_ended(HostState.__new__(HostState), [sequence], clock=17) == []


def test_an_engine_samples_what_single_calls_do(tiny):
    """Call after call, also behind one that was left half way, and after its buffers were freed."""
    model, processor, _ = tiny
    options = dict(n=3, max_new_tokens=6, slots=4)
    engine = Engine(model, processor, ModelRunner, **options)
    half = engine.sample_groups(examples()[1:], seed=1)
    next(half)
    half.close()
    for seed in (1, 2):
        ours = tokens_of(engine.sample_groups(examples()[1:3], seed))
        assert ours == tokens_of(generate(model, processor, examples()[1:3], seed=seed, **options))
        engine.release()


def test_enough_takes_groups_in_the_order_of_the_prompts(tiny, monkeypatch):
    """The first groups with signal, not the first to finish: those would be the short ones."""
    model, processor, _ = tiny
    allowed = (~processor.banned).nonzero()[:, 0].tolist()
    monkeypatch.setattr(processor, "end_ids", allowed[::30])
    many = [dataclasses.replace(e, id=f"{e.id} {i}") for i in range(3) for e in examples()]
    whole = generate(model, processor, many, n=2, max_new_tokens=40, seed=3, slots=24)
    signal = lambda group: (group[0].tokens[0] + group[1].tokens[0]) % 2 == 0  # noqa: E731
    wanted, got = 3, []
    stream = sample_groups(model, processor, many, n=2, max_new_tokens=40, seed=3, slots=24)
    for group in stream:
        got.append(group)
        if sum(map(signal, got)) == wanted:
            break
    steps = stream.runner.clock
    for _ in range(2):
        stream.close()
    assert next(stream, None) is None
    assert tokens_of(got) == tokens_of(whole)[: len(got)]
    # all had slots from the first step on
    behind = [r for group in whole[len(got) :] for r in group]
    assert stream.discarded_samples == len(behind)
    assert stream.discarded_tokens == sum(min(steps, len(r.tokens)) for r in behind)
    assert sum(map(signal, got)) == wanted and signal(got[-1]) and len(got) < len(many)
    longest = [max(len(r.tokens) for r in group) for group in whole]
    in_order, by_time = range(len(got)), sorted(range(len(many)), key=longest.__getitem__)
    # What taking them in the order of finishing would do:
    assert sum(longest[i] for i in by_time[: len(got)]) < sum(longest[i] for i in in_order)


def test_longer_answers_that_earn_more_do_not_wait_for_their_turn(tiny, monkeypatch):
    """Signal grows with length. What is taken ends at the second informative prompt, however many
    slots race for it, and the groups that would be the first to finish are not preferred."""
    model, processor, _ = tiny
    allowed = (~processor.banned).nonzero()[:, 0].tolist()
    monkeypatch.setattr(processor, "end_ids", allowed[::30])
    many = [dataclasses.replace(e, id=f"{e.id} {i}") for i in range(3) for e in examples()]
    whole = generate(model, processor, many, n=2, max_new_tokens=40, seed=5)
    reward = [sum(len(r.tokens) for r in group) for group in whole]
    informative = [i for i, r in enumerate(reward) if r > sorted(reward)[4]]
    for slots in (2, 7, 24):
        got, found = [], 0
        stream = sample_groups(model, processor, many, n=2, max_new_tokens=40, seed=5, slots=slots)
        while found < 2:
            group = next(stream)
            got.append(group)
            found += sum(len(r.tokens) for r in group) > sorted(reward)[4]
        stream.close()
        assert tokens_of(got) == tokens_of(whole[: informative[1] + 1])
    shortest = sorted(informative, key=reward.__getitem__)[:2]
    assert sum(reward[i] for i in informative[:2]) > sum(reward[i] for i in shortest)


def test_answers_of_one_token(tiny, monkeypatch):
    """Whatever comes first ends the sample: nothing is left of its text."""
    model, processor, _ = tiny
    monkeypatch.setattr(processor, "end_ids", (~processor.banned).nonzero()[:, 0].tolist())
    groups = generate(model, processor, examples(), n=3, max_new_tokens=9, slots=2)
    assert [len(group) for group in groups] == [3] * 4
    every = [r for group in groups for r in group]
    assert {(len(r.tokens), len(r.logprobs), r.text, r.finished) for r in every} == {
        (1, 1, "", True)
    }


def test_calls_leave_nothing_behind(tiny):
    """Tensors that are alive, and their bytes, after ten calls and after two."""
    model, processor, _ = tiny

    def alive() -> tuple[int, int]:
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        return len(tensors), sum(
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
        )

    after = []
    for i in range(10):
        generate(model, processor, examples(), n=2, max_new_tokens=4, seed=i, slots=3)
        if i in (1, 9):
            after.append(alive())
    assert after[0] == after[1]


@pytest.mark.parametrize("adapters", [0, 2])
def test_a_graph_outlives_what_a_step_does_to_the_weights(tiny, adapters):
    """It reads addresses: the reference's turn and an update keep them."""
    _, processor, path = tiny
    model = QwenVL.from_pretrained(str(path), dtype=torch.bfloat16)
    lora.learn(model, "lm", adapters)
    engine = ModelRunner(model, Options(n=2, max_new_tokens=4), 4)
    optimizer = Optimizer(model.named_parameters())
    engine.reset(processor)
    engine.graph = recorded = object()
    before = [p.detach().clone() for p in optimizer.compute_weights.values()]
    with policy.Reference(model, optimizer):
        model(processor(examples()[:1], [[[50]]]))
    model(processor(examples()[:1], [[[50, 51]]])).logprob.sum().backward()
    optimizer.step(1.0, 1.0, 0.0, "a step")
    engine.reset(processor)
    assert engine.graph is recorded
    assert any(
        (p != old).any() for p, old in zip(optimizer.compute_weights.values(), before, strict=True)
    )
    weight = model.decoder.layers[-1].mlp.down_proj.weight
    weight.data = weight.data.clone()  # one that has moved
    engine.reset(processor)
    assert engine.graph is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_graph_samples_what_a_cpu_does(tiny):
    """In fp32: refilled slots, room for prompts that grows while samples are live, one graph for
    two calls, weights that change in between."""
    model, processor, path = tiny
    other = QwenVL.from_pretrained(str(path), device="cuda")
    options = dict(n=2, max_new_tokens=20, slots=3, temperature=0.0)
    options |= dict(prefill_tokens=8, prompt_step=8)
    engine = Engine(other, processor, **options)
    for scale in (1.0, 1.5):
        for one in (model, other):
            with torch.no_grad():
                one.decoder.layers[0].mlp.down_proj.weight.mul_(scale)
        ours = tokens_of(engine.sample_groups(examples()))
        truth = tokens_of(generate(model, processor, examples(), **options))
        graph = engine.runner.graph
        assert ours == truth
    used = torch.cuda.memory_allocated()
    list(engine.sample_groups(examples()))
    assert engine.runner.graph is graph and torch.cuda.memory_allocated() == used
    engine.release()
    assert torch.cuda.memory_allocated() < used
    with torch.no_grad():
        model.decoder.layers[0].mlp.down_proj.weight.div_(1.5)


@pytest.mark.parametrize("mkl", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_joined_layers(together, bias, mkl, monkeypatch):
    """Packed once by MKL, where there is one, for any number of rows; or not packed."""
    if mkl and not torch.backends.mkl.is_available():
        pytest.skip("needs MKL")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    layers = [torch.nn.Linear(48, width, bias) for width in (40, 8, 17)]
    if together:
        fuse_linears(*layers)
    with torch.no_grad():
        both = joint_linear(*layers)
        for rows in (1, 2, 7, 32, 33, 200):
            x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(rows))
            torch.testing.assert_close(both(x), torch.cat([layer(x) for layer in layers], -1))


def test_gate_and_up_of_a_gpu(tiny):
    """One product where they lie together, two where they don't or have adapters: the same
    numbers."""
    model, _, path = tiny
    sizes = model.decoder.sizes
    layer = copy.deepcopy(model).decoder.layers[0]
    mlp = layer.mlp
    x = torch.randn(5, mlp.gate_proj.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth = mlp(x)
        assert fused_linears(mlp.gate_proj, mlp.up_proj) is None
        torch.testing.assert_close(FusedLayer(layer, sizes).mlp(x), truth)
        fuse_linears(mlp.gate_proj, mlp.up_proj)
        torch.testing.assert_close(FusedLayer(layer, sizes).mlp(x), truth)
        adapted = QwenVL.from_pretrained(str(path))
        lora.learn(adapted, "lora", 4)
        layer = adapted.decoder.layers[0]
        torch.testing.assert_close(FusedLayer(layer, sizes).mlp(x), layer.mlp(x))


def test_loaded_weights_lie_together(tiny):
    """Also when they learn; and what learns is what is sampled from."""
    _, processor, path = tiny
    model = QwenVL.from_pretrained(str(path))
    projections = input_projections(model.decoder.layers[0])
    weight, bias = fused_linears(*projections)
    before, optimizer = weight.clone(), Optimizer(model.named_parameters())
    model(processor(examples()[:1], [[[50, 51]]])).logprob.sum().backward()
    optimizer.step(1.0, 1.0, 0.0, "a step")
    assert all((now != old).any() for now, old in zip(weight, before, strict=True))
    assert torch.equal(weight, torch.cat([p.weight for p in projections]))
    assert bias is None or torch.equal(bias, torch.cat([p.bias for p in projections]))
    other = copy.deepcopy(model)
    projections = input_projections(other.decoder.layers[0])
    assert fused_linears(*projections) is None
    other.fuse_linears()
    assert torch.equal(fused_linears(*projections)[0], weight)
    mlp = other.decoder.layers[0].mlp
    both = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
    assert torch.equal(fused_linears(mlp.gate_proj, mlp.up_proj)[0], both)


def test_nothing_to_sample(tiny):
    model, processor, _ = tiny
    (group,) = generate(model, processor, examples()[:1], n=2, max_new_tokens=0)
    assert [(r.tokens, r.text, r.finished) for r in group] == [([], "", False)] * 2
    assert generate(model, processor, examples()[:2], n=0) == [[], []]


def test_predict_centres(tiny):
    model, processor, _ = tiny
    alone = predict_centres(model, processor, examples()[1:2])[0]
    together = predict_centres(model, processor, examples())
    assert [c.shape for c in together] == [(0, 3), (1, 3), (0, 3), (0, 3)]
    assert np.abs(together[1] - alone).max() < 1e-5


# ---- In a training run


def train(home: Path, out: Path, **options) -> None:
    """Two steps of train_rl: a prompt with an image and one of text only in each, and rewards that
    differ."""
    cfg = train_rl.Config(
        str(home), (), str(out), steps=2, prompts=2, group=2, max_new_tokens=8, **options
    )
    text = [Example(f"t{i}", "direct", [], f"Say {i}.", "A") for i in range(3)]
    seen = [
        Example(f"s{i}", "lor", [picture(128, 96, i)], f"Where is it, {i}?", "A") for i in range(3)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_data", lambda cfg, *_: (text + seen, []))
        patch.setattr(
            train_rl, "score", lambda text, *_: Scores(len(text) % 5, len(text) % 5, 0.0, 0.0)
        )
        load = run.load_processor

        # rank 0, which has the text, samples one token each; rank 1 never ends
        def hasty(*arguments):
            processor = load(*arguments)
            if ranks.world_size() > 1:
                ends = ~processor.banned if ranks.is_first() else processor.banned
                processor.end_ids = ends.nonzero()[:, 0].tolist()
            return processor

        patch.setattr(run, "load_processor", hasty)
        train_rl.main(cfg)


def test_slots_are_chosen_once(tiny_home, tmp_path, monkeypatch):
    """Written to config.json; --resume takes them from there, whatever it would choose now; a flag
    wins."""
    used, slots = [], lambda: json.loads((tmp_path / "run" / "config.json").read_text())["slots"]
    start = Engine.sample_groups

    def note(self, *arguments):
        used.append(self.options.slots)
        return start(self, *arguments)

    monkeypatch.setattr(Engine, "sample_groups", note)
    monkeypatch.setattr(train_rl, "default_slots", lambda *_: 3)
    train(tiny_home / "tiny", tmp_path / "run", save_every=1)
    assert slots() == 3 and set(used) == {3}
    monkeypatch.setattr(train_rl, "default_slots", lambda *_: 2)
    used.clear()
    (tmp_path / "run" / "step-000002").rename(tmp_path / "run" / "step-000002.partial")
    train(tiny_home / "tiny", tmp_path / "run", resume=True)
    assert slots() == 3 and set(used) == {3}
    train(tiny_home / "tiny", tmp_path / "other", resume=True, slots=1)
    assert json.loads((tmp_path / "other" / "config.json").read_text())["slots"] == 1


@pytest.mark.parametrize(
    "keep, slots, released", [(True, None, 0), (True, 4, 0), (True, 5, 2), (False, 4, 2)]
)
def test_the_cache_goes_before_the_update_where_it_must(
    tiny_home, tmp_path, monkeypatch, keep, slots, released
):
    """The plan's word holds for as many slots as it planned with."""
    settle, calls = run.resolve_auto_settings, []
    fixed = lambda *args, **sizes: dataclasses.replace(settle(*args, **sizes), keep=keep, slots=4)  # noqa: E731
    monkeypatch.setattr(run, "resolve_auto_settings", fixed)
    monkeypatch.setattr(train_rl, "default_slots", lambda *_: 3)
    monkeypatch.setattr(Engine, "release", lambda self: calls.append(1))
    train(tiny_home / "tiny", tmp_path / "run", slots=slots)
    assert len(calls) == released


def test_ranks_with_uneven_work(tiny_home, tmp_path):
    """Rank 0 samples a token for each text-only prompt, rank 1 eight behind images: nobody waits
    for ever."""
    command = [
        warm.python(),
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        __file__,
        str(tiny_home / "tiny"),
        str(tmp_path / "run"),
    ]
    own = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT}/tests/support",
        "OMP_NUM_THREADS": "1",
        "RANK_TIMEOUT": "100",
    }
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [(row["direct_length"], row["lor_length"]) for row in rows] == [(1, 8)] * 2
    assert rows[0]["tokens"] == 2 * 1 + 2 * 8  # of both ranks: --filter none


if __name__ == "__main__":
    train(*map(Path, sys.argv[1:]), shard="always", filter="none")
