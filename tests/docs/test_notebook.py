"""docs/one_step.ipynb runs from the first cell to the last; its exercises are solved by the answers
here, and by nothing less.
"""

import json
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from commands import ROOT

import srreal
from learn import exercises, step
from srreal import Path, target

NOTEBOOK = ROOT / "docs" / "one_step.ipynb"

# The answers: what stands in the cell with the gap.
HACK = """
# The stated number of objects is never compared with the boxes, one coordinate is compared on x
# alone, and a blank <think> is one.
lines = [
    f'<3d_box center="{centre[0]}">{mention}</3d_box>'
    for mention, centre in example.objects.items()
]
detect = "\\n".join(["Find 0 relevant objects:", *lines])
response = f"<detect>{detect}</detect><think></think><answer>{example.answer}</answer>"
"""
NO_STD = """
def advantages(groups, scale):
    starts = torch.tensor([0, 8, 16])[: len(groups) + 1]
    _, values, _ = rewards_and_advantages(
        torch.cat(groups),
        torch.tensor([weights] * len(groups), dtype=torch.float64),
        starts,
        accuracy_column=0,
        scale=scale,
    )
    return values


def share(scale):
    size = advantages([parts, check.calm_parts()], scale).abs()
    return (size[8:].sum() / size.sum()).item()


plain = advantages([parts], "none").tolist()
share_with_std = share("std")
share_without = share("none")
"""
ON_TOTAL = """
def keep_by_total(scores):
    totals = [s.total for s in scores]
    return max(totals) - min(totals) > 1e-6


def response_with(shift):
    lines = [
        f'<3d_box center="{x + shift:.2f},{y:.2f},{z:.2f}">{mention}</3d_box>'
        for mention, (x, y, z) in example.objects.items()
    ]
    detect = "\\n".join([f"Find {len(lines)} relevant objects:", *lines])
    return f"<detect>{detect}</detect><think>so</think><answer>{example.answer}</answer>"


responses = [response_with(shift) for shift in (0, 0.15, 0, 0.25, 0, 0, 0.35, 0)]
"""
NO_DEPTH = """
blind = replace(example, depths=None)
"""
PATH = """
name = "brief"
srreal.PATHS[name] = srreal.Path(
    sections=("answer",),
    instruction="Look at the {images} and answer at once.",
    weights={"accuracy": 0.8, "format": 0.2},
)
"""
ANSWERS = {"gap-1": HACK, "gap-2": NO_STD, "gap-3": ON_TOTAL, "gap-4": NO_DEPTH, "gap-5": PATH}


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def run_notebook(answers: dict[str, str]) -> dict:
    """Execute the code cells in order, those named with an answer's text instead of their own."""
    scope = {"__name__": "notebook"}
    for cell in cells():
        if cell["cell_type"] == "code":
            source = answers.get(cell["id"]) or "".join(cell["source"])
            exec(compile(source, f"cell {cell['id']}", "exec"), scope)
    return scope


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """Start in the root; what a notebook adds to PATHS and sys.path goes again."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = dict(srreal.PATHS)
    yield
    srreal.PATHS.clear()
    srreal.PATHS.update(before)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The trainer, and the notebook's question."""
    trainer = step.set_up(step.settings())
    example, _ = step.recorded(tmp_path_factory.mktemp("room"), trainer.processor)
    return SimpleNamespace(trainer=trainer, example=example)


def test_it_stores_no_outputs_and_has_a_gap_and_a_check_for_each_exercise():
    found = cells()
    ids = Counter(cell["id"] for cell in found)
    assert set(ids.values()) == {1}
    for cell in found:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    for number in range(1, 6):
        assert {f"gap-{number}", f"check-{number}"} <= ids.keys()
    gaps = {cell["id"]: "".join(cell["source"]) for cell in found if cell["id"] in ANSWERS}
    assert all("..." in source for source in gaps.values())


def test_as_it_is_it_runs_to_the_end_and_says_what_is_open(capsys):
    run_notebook({})
    said = capsys.readouterr().out
    for number in range(1, 6):
        assert f"exercise {number}: there is a gap to fill in" in said
    assert "solved" not in said
    # The page's step: advantages of the recorded group, and the step's own log-probs.
    assert "kept: True" in said and "gradient norm" in said


def test_the_answers_solve_it(capsys):
    run_notebook(ANSWERS)
    said = capsys.readouterr().out
    for number in range(1, 6):
        assert f"exercise {number}: solved" in said


# ---- Wrong answers


def test_hack_refuses_honest_and_empty_responses(asked, capsys):
    assert not exercises.hack(target(asked.example), asked.example)
    assert "strict rules still give it something" in capsys.readouterr().out
    assert not exercises.hack("<answer>1</answer>", asked.example)
    assert "don't give it full marks" in capsys.readouterr().out


def test_no_std_refuses_other_numbers(asked, capsys):
    weights = list(srreal.weights_of(asked.example).values())
    parts = exercises.parts_of([srreal.score(target(asked.example), asked.example)] * 7)
    parts = exercises.torch.cat([parts, parts[:1] * 0])
    # Seven at 1 and one at 0: by hand, 1 - 7/8 and -7/8. The calm group's detect parts differ by .2
    # in one of eight, at the weight of .1: .0025 and .0175. So the sums of |A| are 1.75 and .035.
    plain = [0.125] * 7 + [-0.875]
    without = 0.035 / (1.75 + 0.035)
    # Both have one outlier in eight: divided by their std they are the same.
    assert exercises.no_std(plain, 0.5, without, parts, weights)
    assert not exercises.no_std([2 * a for a in plain], 0.5, without, parts, weights)
    assert not exercises.no_std(plain, 0.4, without, parts, weights)
    assert not exercises.no_std(plain, 0.5, 0.5, parts, weights)
    said = capsys.readouterr().out
    for name in ("plain", "share_with_std", "share_without"):
        assert f"`{name}` is" in said


def by_total(scores):
    totals = [s.total for s in scores]
    return max(totals) - min(totals) > 1e-6


def by_accuracy(scores):
    accuracies = [s.accuracy for s in scores]
    return max(accuracies) - min(accuracies) > 1e-6


def test_filter_on_total_refuses_groups_that_teach_and_such_that_none_keeps(asked, capsys):
    right = target(asked.example)
    wrong = right.replace(f"<answer>{asked.example.answer}", "<answer>99")
    other_box = right.replace('center="', 'center="1', 1)
    for responses, reason in (
        ([right] * 7 + [wrong], "accuracies differ"),
        ([right] * 8, "totals are equal"),
        ([right] * 6 + [other_box], "a group has 8"),
    ):
        assert not exercises.filter_on_total(by_total, responses, asked.example)
        assert reason in capsys.readouterr().out
    assert not exercises.filter_on_total(by_accuracy, [right] * 7 + [other_box], asked.example)
    assert "`keep` has to be true" in capsys.readouterr().out


def test_no_depth_refuses_what_is_left_or_lost(asked, capsys):
    example = asked.example
    blind = replace(example, depths=None)
    for given, original, reason in (
        (example, example, "it still has depth"),
        (blind, blind, "original has lost its depth"),
        (replace(blind, question="Where?"), example, "something else has changed"),
    ):
        assert not exercises.no_depth(given, original, asked.trainer)
        assert reason in capsys.readouterr().out


THINK = ("think", "answer")


@pytest.mark.parametrize(
    "name, path, reason",
    [
        ("dtr", None, "was there before"),
        ("a", Path(("detect", "think"), "", {"format": 1.0}), "nothing can be scored"),
        ("a", Path(THINK, "", {"accuracy": 1.0}), "sections of a path that was there"),
        ("a", Path(("answer",), "", {"accuracy": 0.5}), "add up to 0.5"),
        ("a", Path(("answer",), "", {"accuracy": 0.5, "detect": 0.5}), "not everything"),
    ],
)
def test_third_path_refuses_paths_that_do_not_work(name, path, reason, asked, capsys):
    if path:
        srreal.PATHS[name] = path
    assert not exercises.third_path(name, asked.example)
    assert reason in capsys.readouterr().out
