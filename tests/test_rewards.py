"""rewards_and_advantages equals srreal.score on mutated responses and on distances around every
step."""

import math
import random

import pytest
import torch

import srreal
from kernels.rewards import (
    ANY_FRAME,
    DIRECT,
    DTR,
    GIVEN,
    INTERPRET,
    LOR,
    MOTION,
    NO_FRAME,
    NUMBER,
    Scored,
    group_advantages,
    rewards_and_advantages,
)
from srreal import Example

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"


def read(answer, truth):
    """The string half: kind, whether the answer is right or readable, and both as five numbers."""
    if truth.strip() not in tuple("ABCDE"):
        if "move_" in truth or "rotate_" in truth:
            axes = srreal.motion(answer or "")
            return MOTION, math.isfinite(sum(axes)), axes, srreal.motion(truth)
        if math.isfinite(srreal.number(truth)):
            x = srreal.number(answer or "")
            return NUMBER, math.isfinite(x), [x, 0, 0, 0, 0], [srreal.number(truth), 0, 0, 0, 0]
    return GIVEN, srreal.answer_score(answer, truth) == 1.0, [0] * 5, [0] * 5


def pack(groups):
    """[(Example, [responses])] -> Scored."""
    n = {name: [] for name in Scored._fields}
    for name in ("box_start", "group_start", "true_start"):
        n[name].append(0)
    for example, responses in groups:
        several = srreal.several_views(example) and bool(example.objects)
        # by text: "Sofa" and "sofa" are one
        mentions = {m.lower(): i for i, m in enumerate(example.objects)}
        for response in responses:
            parsed = srreal.parse(response, example.path)
            kind, right, x, truth = read(parsed.answer, example.answer)
            n["well_formed"].append(parsed.well_formed)
            n["parsed"].append(right)
            n["answer"].append(x)
            n["frame"].append(NO_FRAME if parsed.frame is None else parsed.frame)
            n["box_centre"] += [xyz for _, _, xyz in parsed.boxes]
            n["box_mention"] += [mentions.get(m.lower(), -1) for m, _, _ in parsed.boxes]
            n["box_start"].append(len(n["box_mention"]))
        kind, _, _, truth = read("", example.answer)
        n["group_start"].append(len(n["frame"]))
        n["path"].append({"lor": LOR, "dtr": DTR, "direct": DIRECT}[example.path])
        n["kind"].append(kind)
        n["truth"].append(truth)
        n["objects"].append(len(example.objects) if example.path == "dtr" else 0)
        n["wanted_frame"].append(
            ANY_FRAME if example.frame is None or not several else example.frame
        )
        for mention, centre in example.objects.items():
            for k, xyz in centre.items() if several else [(ANY_FRAME, centre)]:
                n["true_centre"].append(xyz)
                n["true_mention"].append(mentions[mention.lower()])
                n["true_frame"].append(k)
        n["true_start"].append(len(n["true_mention"]))
    dtypes = {
        "well_formed": torch.bool,
        "parsed": torch.bool,
        "answer": torch.float64,
        "truth": torch.float64,
    }
    tensors = {
        k: torch.tensor(
            v,
            dtype=dtypes.get(k, torch.float64 if k.endswith("centre") else torch.int64),
            device=DEVICE,
        )
        for k, v in n.items()
    }
    for k, width in (("box_centre", 3), ("true_centre", 3), ("answer", 5), ("truth", 5)):
        tensors[k] = tensors[k].view(-1, width)
    return Scored(**tensors)


def compare(groups):
    got = rewards_and_advantages(pack(groups))
    scores = [srreal.score(r, e) for e, responses in groups for r in responses]
    for name, ours, steps in (
        ("total", got.total, False),
        ("accuracy", got.accuracy, False),
        ("format", got.format, True),
        ("detect", got.detect, True),
    ):
        true = torch.tensor([getattr(s, name) for s in scores], dtype=torch.float64)
        error = (ours.cpu() - true).abs()
        assert error.numel() == 0 or error.max() <= (0 if steps else 1e-12), (name, error.argmax())
    at = 0
    for g, (_, responses) in enumerate(groups):
        part, at = scores[at : at + len(responses)], at + len(responses)
        accuracy, total = (
            [s.accuracy for s in part],
            torch.tensor([s.total for s in part], dtype=torch.float64),
        )
        assert got.keep[g].item() == (bool(part) and max(accuracy) - min(accuracy) > 1e-6)
        if len(part) > 1:
            expected = (total - total.mean()) / (total.std() + 1e-6)
            torch.testing.assert_close(
                got.advantage[at - len(part) : at].cpu(), expected, rtol=1e-9, atol=1e-9
            )
        elif part:
            assert got.advantage[at - 1] == 0
    return got


ONE = {"red bbox": (0.3, -0.81, 3.32), "blue point": (1.0, 0.2, 2.5), "Sofa": (-1.0, 0.4, 4.0)}
MANY = {
    "red bbox": {0: (0.3, -0.81, 3.32), 1: (0.1, 0.0, 2.0)},
    "blue point": {1: (1.0, 0.2, 2.5), 12: (1.0, 0.5, 2.5)},
    "Sofa": {},
}
ANSWERS = ["B", "1.52", "0", "-3", "move_right:0.4,rotate_left:30", "move_up:0", "a chair", "12 cm"]
PIECES = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<detect>",
    "</detect>",
    "\n",
    " ",
    ".",
    "B",
    "(b)",
    "1.5 m",
    "152cm",
    "nan",
    "1e3",
    "99999999999999999999",
    "move_left:0.4",
    ",",
    "rotate_left:29",
    "red bbox",
    "sofa",
    "-0.81",
    "3",
    "é",
    '<3d_box center="0.3,-0.8,3.4">x (SOFA)</3d_box>\n',
    "After aligning to the reference frame 12, find 1 relevant objects:",
]


def examples():
    for answer in ANSWERS:
        for path, objects, frame, images in (
            ("lor", {}, None, 1),
            ("dtr", ONE, None, 1),
            ("dtr", MANY, None, 2),
            ("dtr", MANY, 1, 2),
            ("dtr", {}, None, 1),
            ("direct", {}, None, 1),
            ("lor", ONE, None, 1),
        ):
            yield Example(
                "e",
                path,
                [None] * images,
                "?",
                answer,
                objects=objects,
                frame=frame,
                rationale="so",
            )


def response(rng, example):
    """A well-formed response, its numbers a little off."""
    near = lambda v: round(v + rng.choice((0, 0, 0.03, -0.1, 0.2, 0.6)), 2)  # noqa: E731
    answer = rng.choice(
        [
            example.answer,
            rng.choice(ANSWERS),
            f"{example.answer}.",
            str(near(1.5)),
            "move_right:0.4,rotate_left:25",
        ]
    )
    if example.path == "direct":
        return answer
    text = f"<think>so</think>\n<answer>{answer}</answer>"
    if example.path == "lor":
        return text
    view = rng.choice((0, 1, 12, 3))
    lines = []
    for mention, xyz in (example.objects or ONE).items():
        xyz = xyz.get(view, (0, 0, 0)) if isinstance(xyz, dict) else xyz
        centre = ",".join(str(near(v)) for v in xyz)
        lines += [f'<3d_box center="{centre}">thing ({mention})</3d_box>'] * rng.choice(
            (0, 1, 1, 1, 2)
        )
    rng.shuffle(lines)
    head = (
        f"After aligning to the reference frame {view}, find"
        if rng.random() < 0.7 and srreal.several_views(example)
        else "Find"
    )
    return "\n".join([f"<detect>{head} {len(lines)} relevant objects:", *lines, "</detect>"]) + text


def mutate(rng, text):
    for _ in range(rng.choice((0, 0, 1, 2))):
        i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        j = min(j, i + 12)
        text = rng.choice(
            (text[:i] + text[j:], text[:i] + rng.choice(PIECES) + text[i:], text[:j] + text[i:])
        )
    return text


def test_twenty_thousand_mutated_responses():
    rng, groups, count = random.Random(0), [], 0
    while count < (150 if INTERPRET else 20_000):
        for example in examples():
            groups.append(
                (
                    example,
                    [
                        mutate(rng, response(rng, example))
                        for _ in range(rng.choice((0, 1, 5, 8, 13)))
                    ],
                )
            )
            count += len(groups[-1][1])
    got = compare(groups)
    assert (
        0.2 < got.format.mean() < 0.9
        and 0.05 < got.accuracy.mean() < 0.9
        and got.detect.gt(0).double().mean() > 0.1
    )
    assert 0.1 < got.keep.double().mean() < 0.9


def test_centres_on_the_grid_around_every_step():
    """Ties (exactly 0.1 m on the 0.01 m grid) must fall alike here and on the host, in every
    direction."""
    truth, responses = (0.31, -0.81, 3.32), []
    for limit in (10, 20, 30, 40, 60, 100):
        for cm in (limit - 1, limit, limit + 1):
            offsets = {(cm, 0, 0), (0, -cm, 0), (0, 0, cm)}
            offsets |= {(a, b, 0) for a in range(cm + 1) for b in [math.isqrt(cm * cm - a * a)]}
            offsets |= {(a, 0, -b) for a in range(cm + 1) for b in [math.isqrt(cm * cm - a * a)]}
            for offset in sorted(offsets):
                xyz = ",".join(f"{t + o / 100:.2f}" for t, o in zip(truth, offset, strict=True))
                responses.append(
                    f'<detect>Find 1 relevant objects:\n<3d_box center="{xyz}">a (m)</3d_box>'
                    "</detect><think>t</think><answer>A</answer>"
                )
    got = compare([(Example("e", "dtr", [None], "?", "A", objects={"m": truth}), responses)])
    assert set(got.detect.tolist()) == {0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0}


def test_mentions_that_differ_in_case_only_share_a_box():
    objects = {"Sofa": (1.0, 0.0, 2.0), "chair": (0.0, 0.0, 1.0), "sofa": (1.0, 0.0, 2.5)}
    head, tail = "<detect>Find 1 relevant objects:\n", "</detect><think>t</think><answer>A</answer>"
    boxes = [
        f'{head}<3d_box center="1.0,0.0,{z}">a (SOFA)</3d_box>{tail}' for z in ("2.0", "2.5", "9")
    ]
    got = compare([(Example("e", "dtr", [None], "?", "A", objects=objects), boxes)])
    assert got.detect.tolist() == pytest.approx([1.2 / 3, 1.2 / 3, 0])


def test_group_advantages():
    total = torch.tensor([1.0, 0.0, 0.2, 0.2, 0.7, 1.0, 1.0, 0.9], dtype=torch.float64)
    accuracy = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0 - 1e-7], dtype=torch.float64)
    advantage, keep = group_advantages(total, accuracy, torch.tensor([0, 2, 4, 4, 5, 8]))
    assert keep.tolist() == [True, False, False, False, False]
    assert advantage[:5].tolist() == pytest.approx([0.7071, -0.7071, 0, 0, 0], abs=1e-4)
    assert advantage[5:].sum().item() == pytest.approx(0, abs=1e-9) and advantage[7] < -1


def test_no_completions():
    got = compare(
        [
            (Example("e", "dtr", [None], "?", "A", objects=ONE), []),
            (Example("f", "lor", [None], "?", "A"), []),
        ]
    )
    assert len(got.total) == 0 and got.keep.tolist() == [False, False]
    assert len(compare([]).keep) == 0
    with pytest.raises(ValueError):
        rewards_and_advantages(pack([])._replace(path=torch.zeros(2)))


def test_views_are_read_as_what_they_hold():
    """Every second of twice as many, transposed centres."""
    truth = (0.31, -0.81, 3.32)
    xyz = ",".join(map(str, truth))
    responses = [
        f'<detect>Find 1 relevant objects:\n<3d_box center="{xyz}">a (m)</3d_box></detect>'
        f"<think>t</think><answer>{answer}</answer>"
        for answer in "AAB"
    ]
    packed = pack([(Example("e", "dtr", [None], "?", "A", objects={"m": truth}), responses)])
    strided = packed._replace(
        **{k: x.repeat_interleave(2, 0)[::2] for k, x in packed._asdict().items()},
    )
    turned = strided._replace(box_centre=packed.box_centre.T.contiguous().T)
    for views in (strided, turned):
        for a, b in zip(rewards_and_advantages(packed), rewards_and_advantages(views), strict=True):
            assert torch.equal(a, b)
