"""Sampling against transformers' generate, and what it promises: groups, batches and order change nothing."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from model.processor import Processor
from model.qwen_vl import QwenVL
from model.rollout import generate, predict_centres
from model.tiny import write
from srreal import Example


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def tiny(request, tmp_path_factory):
    """A tiny checkpoint of each family: our model, its processor, and the directory."""
    path = tmp_path_factory.mktemp(request.param)
    write(request.param, str(path), seed=1)
    return QwenVL.from_pretrained(str(path)), Processor.from_pretrained(str(path)), path


def picture(width: int, height: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


def examples() -> list[Example]:
    """Two images, one image with a region and depth, text only, a long prompt: all of different lengths."""
    depth = np.full((96, 128), 2.5, np.float32)
    return [
        Example("two", "lor", [picture(128, 96, 0), picture(64, 96, 1)], "Which of the two is closer?", "A"),
        Example("one", "dtr", [picture(128, 96, 2)], "How far is the box (red bbox <mask>)?", "2.5",
                depths=[depth], intrinsics=[(100.0, 100.0, 63.5, 47.5)], regions=[(0, (10, 20, 60, 70))]),
        Example("text", "direct", [], "Say something about chairs.", "chair"),
        Example("long", "lor", [picture(96, 128, 3)], "Is it so? " * 30, "B"),
    ]  # fmt: skip


def test_greedy_equals_transformers(tiny):
    model, processor, path = tiny
    reference = AutoModelForImageTextToText.from_pretrained(path).eval()
    plain = [e for e in examples() if not e.regions]
    rollouts = generate(model, processor, plain, n=1, max_new_tokens=24, temperature=0.0)
    for example, (rollout,) in zip(plain, rollouts, strict=True):
        batch = processor([example])
        ids = batch.input_ids[None]
        images = {} if batch.pixel_values is None else dict(
            pixel_values=batch.pixel_values, image_grid_thw=batch.image_grid_thw,
            mm_token_type_ids=(ids == processor.image_token_id).int())  # fmt: skip
        out = reference.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
            suppress_tokens=processor.banned.nonzero()[:, 0].tolist(), **images,
        )  # fmt: skip
        assert rollout.tokens == out[0, ids.shape[1] :].tolist()


def test_logprobs_are_the_trainers(tiny):
    """Sampled log-probs equal a teacher-forced forward: ours, packed behind one prompt, and transformers'."""
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
    logits = reference(input_ids=ids, pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw,
                       mm_token_type_ids=(ids == processor.image_token_id).int()).logits  # fmt: skip
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


def test_end_tokens_length_and_bans(tiny):
    model, processor, _ = tiny
    weight = model.head_weight
    backup = weight.detach().clone()
    image, end = processor.image_token_id, processor.end_ids[0]
    try:
        with torch.no_grad():  # a model that wants to say nothing but image placeholders and the end token
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
    heard = []
    generate(model, processor, examples(), n=2, max_new_tokens=2, progress=heard.append)
    assert sum(heard) == 8


def tokens_of(groups):
    return [[r.tokens for r in group] for group in groups]


def test_slots_prefill_budget_and_refills_change_nothing(tiny, monkeypatch):
    """Samples of geometric lengths, in fewer slots than a group has, in more than there is work, prompt by
    prompt."""
    model, processor, _ = tiny
    allowed = (~processor.banned).nonzero()[:, 0].tolist()
    monkeypatch.setattr(processor, "end_ids", allowed[::7])
    whole = generate(model, processor, examples(), n=3, max_new_tokens=20, seed=1, slots=12)
    lengths = {len(r.tokens) for group in whole for r in group}
    assert len(lengths) > 5  # so slots are refilled at different times
    for slots in (2, 5, 1000):
        again = generate(model, processor, examples(), n=3, max_new_tokens=20, seed=1, slots=slots)
        assert tokens_of(again) == tokens_of(whole)
    monkeypatch.setattr("model.rollout.PREFILL", {"cpu": 8})  # every prompt is longer
    monkeypatch.setattr("model.rollout.PAD", 8)  # so that the room for prompts grows while samples are live
    small = generate(model, processor, examples(), n=3, max_new_tokens=20, seed=1, slots=5)
    assert tokens_of(small) == tokens_of(whole)


def test_enough_takes_groups_in_the_order_of_the_prompts(tiny, monkeypatch):
    """The first groups with signal, not the first to finish: those would be the short ones."""
    model, processor, _ = tiny
    allowed = (~processor.banned).nonzero()[:, 0].tolist()
    monkeypatch.setattr(processor, "end_ids", allowed[::30])
    many = [dataclasses.replace(e, id=f"{e.id} {i}") for i in range(3) for e in examples()]
    whole = generate(model, processor, many, n=2, max_new_tokens=40, seed=2, slots=24)
    signal = lambda group: (group[0].tokens[0] + group[1].tokens[0]) % 2 == 0  # noqa: E731
    wanted, heard = 3, []

    def enough(group):
        heard.append(group)
        return sum(map(signal, heard)) == wanted

    got = generate(model, processor, many, n=2, max_new_tokens=40, seed=2, slots=24, enough=enough)
    assert tokens_of(got) == tokens_of(whole)[: len(got)] == tokens_of(heard)
    assert sum(map(signal, got)) == wanted and signal(got[-1]) and len(got) < len(many)
    longest = [max(len(r.tokens) for r in group) for group in whole]
    in_order, by_time = range(len(got)), sorted(range(len(many)), key=longest.__getitem__)
    # What taking them in the order of finishing would do:
    assert sum(longest[i] for i in by_time[: len(got)]) < sum(longest[i] for i in in_order)


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
