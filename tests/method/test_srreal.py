"""srreal.py against hand-computed values, closed forms, and a second reading of the grammar (a
regex)."""

import dataclasses
import inspect
import math
import pickle
import random
import re
import sys

import pytest

import latex
import official
import srreal
from srreal import Example, Scores, answer_score, parse, prompt, score, target

BOX = '<3d_box center="0.3,-0.81,3.32">chair (red bbox)</3d_box>'
BOX2 = '<3d_box center="1.0,0.5,2.0">table (blue point)</3d_box>'


def dtr(detect, think="so", answer="B"):
    return f"<detect>{detect}</detect>\n<think>{think}</think>\n<answer>{answer}</answer>"


def lor(think="so", answer="B"):
    return f"<think>{think}</think>\n<answer>{answer}</answer>"


def one(answer="B", path="dtr", **more):
    defaults = dict(
        objects={"red bbox": (0.3, -0.81, 3.32)}, names={"red bbox": "chair"}, rationale="so"
    )
    return Example(
        "e1",
        path,
        ["a.png"],
        "Is the chair (red bbox <mask>) near?",
        answer,
        **{**defaults, **more},
    )


def four(scores):
    """(total, accuracy, format, detect), whatever rewards a fork adds."""
    return scores.total, scores.accuracy, scores.format, scores.detect


# ---- Example


def test_example_has_the_documented_fields_in_order():
    names = [f.name for f in dataclasses.fields(Example)]
    assert names == [
        "id",
        "path",
        "images",
        "question",
        "answer",
        "depths",
        "intrinsics",
        "regions",
        "objects",
        "frame",
        "task",
        "rationale",
        "names",
        "sizes",
    ]
    e = Example("i", "lor", [], "q", "a")
    assert (e.depths, e.intrinsics, e.regions, e.objects, e.frame) == (None, None, [], {}, None)
    assert (e.task, e.rationale, e.names, e.sizes) == ("", None, {}, None)
    assert e.objects is not Example("i", "lor", [], "q", "a").objects


def test_scores_are_named_in_order_and_pickle():
    scores = score(lor(), one(path="lor", objects={}))
    assert list(scores.parts) == list(srreal.REWARDS)
    assert list(scores.parts)[:3] == ["accuracy", "format", "detect"]
    assert four(scores) == (1.0, 1.0, 1.0, 0.0) and pickle.loads(pickle.dumps(scores)) == scores
    total, *parts = scores
    assert total == scores.total and parts == list(scores.parts.values())
    assert len(scores) == 1 + len(parts)
    assert scores == Scores(*scores) == tuple(scores) and scores != tuple(scores)[:-1]
    assert scores != Scores(1.0, 1.0, 0.5, 0.0) and scores != "1.0"
    assert Scores(0.5, 0.25).parts["accuracy"] == 0.25 and Scores(0.5, 0.25).detect == 0.0


def test_srreal_needs_the_standard_library_only():
    imports = re.findall(r"^(?:import|from) (\w+)", inspect.getsource(srreal), re.MULTILINE)
    assert set(imports) <= {"math", "re", "collections", "dataclasses", "official", "latex"}
    for module in (official, latex):
        imports = re.findall(r"^(?:import|from) (\w+)", inspect.getsource(module), re.MULTILINE)
        assert set(imports) <= sys.stdlib_module_names


# ---- Prompt


def test_prompt_structure_and_length():
    for path, images, limit in (("lor", 1, 45), ("lor", 3, 45), ("dtr", 1, 60), ("dtr", 3, 60)):
        text = prompt(
            Example("e", path, ["x"] * images, "How far is <image> the chair <mask>?", "1")
        )
        role, *_, last = text.split("\n\n")
        assert last == " Question: How far is <image> the chair <mask>?"
        assert "\n" not in role and text.startswith(role + "\n\n")
        assert len(text.split()) - 7 <= limit
        assert ("images" in text) == (images > 1)
        for tag in ("think", "answer"):
            assert f"<{tag}>" in text and f"</{tag}>" in text
        assert ("<detect>" in text and "<3d_box center=" in text) == (path == "dtr")
        assert ("reference frame" in text) == (path == "dtr" and images > 1)


def test_prompt_of_direct_is_the_question_and_braces_are_text():
    assert (
        prompt(Example("e", "direct", ["x"], "Describe {this} <mask>.", "a"))
        == "Describe {this} <mask>."
    )
    assert prompt(Example("e", "dtr", ["x"], "{images} {0} HEADER?", "a")).endswith(
        "{images} {0} HEADER?"
    )


def test_prompt_follows_the_truth_where_there_is_one():
    assert "reference frame" in prompt(one(objects={"a": {0: (1, 2, 3)}}))
    assert "reference frame" not in prompt(dataclasses.replace(one(), images=["a", "b"]))


def test_unknown_path_and_rules_are_value_errors():
    bad = dataclasses.replace(one(), path="cot")
    for call in (
        lambda: prompt(bad),
        lambda: target(bad),
        lambda: parse("x", "cot"),
        lambda: parse("x", None),
        lambda: score("x", bad),
        lambda: score("x", one(), rules="lenient"),
    ):
        with pytest.raises(ValueError, match="lor|strict"):
            call()


# ---- Target


def test_target_to_the_letter():
    e = one(
        objects={"red bbox": (0.3, -0.8149, 3.316), "blue point": (-0.001, 2, 10.0)},
        names={"red bbox": "chair"},
    )
    assert target(e) == (
        "<detect>Find 2 relevant objects:\n"
        '<3d_box center="0.3,-0.81,3.32">chair (red bbox)</3d_box>\n'
        '<3d_box center="0.0,2,10.0">blue point</3d_box></detect>\n'
        "<think>so</think>\n<answer>B</answer>"
    )
    assert target(one(path="lor")) == "<think>so</think>\n<answer>B</answer>"
    assert target(one(path="direct", answer=" 0.3 ", rationale=None)) == " 0.3 "


def test_target_picks_the_frame():
    views = {
        "red bbox": {1: (0, 0, 1.0), 2: (0, 0, 2.0), 3: (0, 0, 3.0)},
        "blue bbox": {2: (1, 1, 2.5), 3: (1, 1, 3.5)},
    }
    first = target(one(objects=views)).split("\n")
    assert first[0] == "<detect>After aligning to the reference frame 2, find 2 relevant objects:"
    assert first[1] == '<3d_box center="0,0,2.0">chair (red bbox)</3d_box>'
    assert "frame 3," in target(one(objects=views, frame=3))
    for frame in (1, 7):
        with pytest.raises(ValueError, match="e1"):
            target(one(objects=views, frame=frame))
    with pytest.raises(ValueError, match="e1"):
        target(one(objects={"a": {0: (1, 1, 1)}, "b": {1: (1, 1, 1)}}))


@pytest.mark.parametrize(
    "change",
    [
        dict(rationale=None),
        dict(rationale=" \n"),
        dict(objects={}),
        dict(rationale="see </think>"),
        dict(answer=""),
        dict(names={"red bbox": "a\nb"}),
        dict(names={"red bbox": "<3d_box"}),
        dict(rationale="a <detect> b"),
        dict(objects={"red bbox": (math.nan, 0, 0)}),
        dict(objects={"red bbox": (math.inf, 0, 0)}),
        dict(objects={"red bbox": (1e17, 0.0, 0.0)}),
        dict(objects={"red bbox": (1.0, 2.0)}),
        dict(objects={"": (1, 2, 3)}),
        dict(objects={" red": (1, 2, 3)}, names={}),
        dict(objects={"a)b(": (1, 2, 3)}, names={"a)b(": "x"}),
    ],
)
def test_target_refuses_what_would_not_read_back(change):
    with pytest.raises(ValueError, match="e1"):
        target(one(**change))


def random_example(rng, path, several):
    mentions = rng.sample(
        ["red bbox", "blue bbox", "green point", "the lamp", "Sofa (left)", "b"], rng.randint(1, 5)
    )

    def centre():
        return tuple(rng.uniform(-1, 1) * 10 ** rng.uniform(-3, 2) for _ in range(3))

    objects = {
        m: {v: centre() for v in rng.sample(range(12), 6)} | {12: centre()} if several else centre()
        for m in mentions
    }
    answer = rng.choice(
        ["A", "E", "1.5", "-0.02", "3 feet", "0", "a red chair.", "move_up:0.2,rotate_left:30"]
    )
    names = {
        m: rng.choice(["chair", "desk (old)", "TV > 3 m", "stühle 椅子"])
        for m in mentions
        if "(" in m or rng.random() < 0.7
    }
    return Example(
        str(rng.random()),
        path,
        ["a"] * (13 if several else 1),
        "Where?",
        answer,
        objects=objects,
        names=names,
        frame=12 if several and rng.random() < 0.5 else None,
        rationale="Because\r\n1 < 2. ",
    )


@pytest.mark.parametrize("path", ["lor", "dtr"])
@pytest.mark.parametrize("several", [False, True])
def test_round_trip_earns_everything(path, several):
    rng = random.Random(f"{path}{several}")
    for _ in range(300):
        e = random_example(rng, path, several)
        text = target(e)
        parsed = parse(text, path)
        assert parsed.well_formed and parsed.think == e.rationale and parsed.answer == e.answer
        if path == "dtr":
            assert [b[0] for b in parsed.boxes] == list(e.objects) and parsed.count == len(
                e.objects
            )
            assert [b[1] for b in parsed.boxes] == [e.names.get(m, m) for m in e.objects]
            assert (parsed.frame is not None) == several
        assert score(text, e).total == pytest.approx(1.0, abs=1e-12)
        assert score(text.replace("\n", "\r\n"), e).total == pytest.approx(1.0, abs=1e-12)


# ---- Grammar: a second reading of it. Exponential in the worst case, so for short texts only.

NUM = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
SP = r"[^\S\n]*"
NAME = r"((?:(?!</?3d_box)[^\n]|</3d_box(?!>))+)"
LINE = rf'{SP}<3d_box center="({NUM}),({NUM}),({NUM})">{NAME}</3d_box>{SP}'
FRAME = "After aligning to the reference frame"
HEAD = rf"(?:Find|{FRAME} [0-9]{{1,4}}, find) ([0-9]{{1,4}}) relevant objects:"
TAIL = r"\s*<think>(?P<t>.*)</think>\s*<answer>(?P<a>.*)</answer>\s*"


def reads(response, path):
    """Whether a response is well-formed, by regular expressions."""
    tags = ["think", "answer", "detect"]
    counts = [response.count(f"<{tag}>") for tag in tags] + [
        response.count(f"</{tag}>") for tag in tags
    ]
    if counts != ([1, 1, 0, 1, 1, 0] if path == "lor" else [1] * 6):
        return False
    front = (
        r"\s*"
        if path == "lor"
        else rf"\s*<detect>\s*{HEAD}{SP}(?P<lines>(?:\n{LINE})*)\s*</detect>"
    )
    match = re.fullmatch(front + TAIL, response, re.DOTALL)
    if not match or not match["t"].strip() or not match["a"].strip():
        return False
    if path == "lor":
        return True
    lines = [re.fullmatch(LINE, line) for line in match["lines"].split("\n")[1:]]
    good = all(max(map(len, m.groups()[:3])) <= 20 and named(m[4].strip()) for m in lines)
    return good and len(lines) == int(match[1]) >= 1


def named(text):
    """Neither the mention nor what is left of the name is blank (for parentheses that do not
    nest)."""
    inside = re.fullmatch(r"(.*)\(([^()]*)\)", text)
    return bool(text) and (not inside or bool(inside[1].strip() and inside[2].strip()))


GOOD = [
    dtr(f"Find 1 relevant objects:\n{BOX}"),
    dtr(f"\n\n  Find 01 relevant objects:  \r\n\t{BOX} \r\n\n"),
    dtr(f"Find 0001 relevant objects:\n{BOX}"),
    dtr(f"After aligning to the reference frame 12, find 2 relevant objects:\n{BOX}\n{BOX2}"),
    " \n" + dtr(f"Find 1 relevant objects:\n{BOX}").replace("\n<", "\r\n\t <") + "\n\n",
    dtr(f"Find 1 relevant objects:\n{BOX}").replace(
        "0.3,-0.81,3.32", "+.5,5.,-" + "0" * 15 + "1.23"
    ),
    dtr(
        f"Find 1 relevant objects:\n{BOX}",
        think=f"the {BOX} <THINK> < / > <Answer>",
        answer='<3d_box center="',
    ),
    dtr('Find 1 relevant objects:\n<3d_box center="1,2,3">chair</3d_box>'),
    dtr('Find 1 relevant objects:\n<3d_box center="1,2,3">a "big">chair( x )</3d_box>'),
    dtr('Find 1 relevant objects:\n<3d_box center="1,2,3">a <b> (TV < 3 m)</3d_box>'),
]
D = "Find 1 relevant objects:\n"
BAD_BLOCKS = {
    "empty": "",
    "blank": " \n",
    "no header": BOX,
    "no lines": "Find 0 relevant objects:",
    "zero": f"Find 0 relevant objects:\n{BOX}",
    "count low": f"{D}{BOX}\n{BOX2}",
    "count high": f"Find 2 relevant objects:\n{BOX}",
    "singular": f"Find 1 relevant object:\n{BOX}",
    "upper find": f"find 1 relevant objects:\n{BOX}",
    "two blanks": f"Find  1 relevant objects:\n{BOX}",
    "five digits": f"Find 00001 relevant objects:\n{BOX}",
    "signed": f"Find +1 relevant objects:\n{BOX}",
    "arabic digit": f"Find \u0661 relevant objects:\n{BOX}",
    "full-width": f"Find \uff11 relevant objects:\n{BOX}",
    "frame five digits": f"{FRAME} 00000, find 1 relevant objects:\n{BOX}",
    "frame negative": f"After aligning to the reference frame -1, find 1 relevant objects:\n{BOX}",
    "frame upper": f"After aligning to the reference frame 0, Find 1 relevant objects:\n{BOX}",
    "frame no comma": f"After aligning to the reference frame 0 find 1 relevant objects:\n{BOX}",
    "blank line": f"{D}\n{BOX}",
    "blank line between": f"Find 2 relevant objects:\n{BOX}\n \n{BOX2}",
    "prose before": f"Well.\n{D}{BOX}",
    "prose after": f"{D}{BOX}\nDone.",
    "prose on the line": f"{D}{BOX}.",
    "two on a line": f"Find 2 relevant objects:\n{BOX}{BOX2}",
    "two as one": f"{D}{BOX} {BOX2}",
    "same line as header": f"Find 1 relevant objects: {BOX}",
    "old mac line end": f"Find 1 relevant objects:\r{BOX}",
    "form feed": f"Find 1 relevant objects:\f{BOX}",
    "line separator": f"Find 1 relevant objects:\u2028{BOX}",
}
BAD_CENTRES = [
    "1,2",
    "1,2,3,4",
    "",
    ",,",
    "1,,3",
    "1, 2,3",
    " 1,2,3",
    "1,2,3 ",
    "1e0,2,3",
    "1,2,nan",
    "inf,2,3",
    "1,2,0x3",
    "1_0,2,3",
    "1,2,\u0663",
    "--1,2,3",
    "+-1,2,3",
    "1,2,.",
    "1,2,+",
    "1.2.3,2,3",
    "1;2;3",
    "1,2,3m",
    "1,2," + "3" * 21,
    "1,2,-" + "0" * 20,
    "1,2,3\n",
    "(1,2,3)",
    "1\u00a0,2,3",
]
BAD_NAMES = [
    "",
    " ",
    "()",
    "( )",
    "chair ()",
    "chair ( )",
    "(red bbox)",
    " (red bbox) ",
    "a <3d_box (red bbox)",
    "a (b)</3d_box> c (d)",
    "chair (red bbox)</3d_box>",
    "chair\n(red bbox)",
]
BAD_LINES = [
    '<3d_box  center="1,2,3">a</3d_box>',
    "<3d_box center='1,2,3'>a</3d_box>",
    '<3D_box center="1,2,3">a</3D_box>',
    '<3d_box center="1,2,3" >a</3d_box>',
    '<3d_box center="1,2,3">a',
    '<3d_box center="1,2,3" size="1,1,1">a</3d_box>',
    '<3d_box center="1,2,3>a</3d_box>',
    '<3d_box center="1,2,3</3d_box>',
    "a (red bbox)",
    '- <3d_box center="1,2,3">a</3d_box>',
]


@pytest.mark.parametrize("text", GOOD)
def test_grammar_accepts(text):
    assert parse(text, "dtr").well_formed and reads(text, "dtr")


@pytest.mark.parametrize(
    "block",
    [
        *BAD_BLOCKS.values(),
        *(D + line for line in BAD_LINES),
        *(f'{D}<3d_box center="{c}">a (b)</3d_box>' for c in BAD_CENTRES),
        *(f'{D}<3d_box center="1,2,3">{n}</3d_box>' for n in BAD_NAMES),
    ],
)
def test_grammar_rejects_blocks(block):
    text = dtr(block)
    assert not parse(text, "dtr").well_formed and not reads(text, "dtr")
    assert score(text, one()) == Scores(0.0, 0.0, 0.0, 0.0)


def test_grammar_rejects_sections():
    good, wrong = dtr(D + BOX), []
    for tag in ("detect", "think", "answer"):
        for mark in (f"<{tag}>", f"</{tag}>"):
            wrong += [
                good.replace(mark, ""),
                good + mark,
                mark + good,
                good.replace("so", "so" + mark),
                good.replace("chair", "chair " + mark),
                good.replace(mark, mark.upper()),
                good.replace(mark, mark.replace(tag, tag + " ")),
                good.replace(mark, mark + mark),
            ]
    a, b, c = good.split("</detect>")[0] + "</detect>", "<think>so</think>", "<answer>B</answer>"
    wrong += [
        b + a + c,
        a + c + b,
        c + b + a,
        a + b,
        b + c,
        a + "x" + b + c,
        a + b + "." + c,
        a + b + c + "\0",
        "x" + good,
        "\ufeff" + good,
        dtr(D + BOX, think=" \n\u00a0"),
        dtr(D + BOX, answer="\t"),
        f"{a}<think>s<answer>B</answer></think>",
    ]
    for text in wrong:
        assert not parse(text, "dtr").well_formed and not reads(text, "dtr"), text
    for text in (
        good,
        "",
        "B",
        b,
        c,
        c + b,
        b + b + c,
        b + c + c,
        lor(think=""),
        lor(answer=" "),
        lor() + "<detect>",
        "x" + lor(),
        lor(think="</detect>"),
        "<think>s<answer>B</answer></think>",
        "<answer><think>s</think>B</answer>",
    ):
        assert not parse(text, "lor").well_formed and not reads(text, "lor"), text
    assert parse(lor(think="<3d_box <Detect>", answer="a\nb"), "lor").well_formed


def test_direct_is_the_whole_text():
    assert parse(" <answer>B\n", "direct") == srreal.Parsed(answer=" <answer>B\n", well_formed=True)
    assert not parse(" \n", "direct").well_formed
    e = one(path="direct", objects={}, answer="1.5")
    assert four(score(" 1.5 m\n", e)) == (1.0, 1.0, 1.0, 0.0)
    assert score("", e) == Scores(0.0, 0.0, 0.0, 0.0)
    assert score("1.5", e, rules="official").total == 1.0


@pytest.mark.parametrize(
    "text, mention, name",
    [
        ("chair (red bbox)", "red bbox", "chair"),
        ("chair", "chair", "chair"),
        ("chair(x)", "x", "chair"),
        ("chair (old) (red bbox)", "red bbox", "chair (old)"),
        ("chair (red bbox) left", *["chair (red bbox) left"] * 2),
        ("chair (red bbox", *["chair (red bbox"] * 2),
        ("chair red)", *["chair red)"] * 2),
        (" lamp ( a ) ", "a", "lamp"),
        ("sofa (sofa (left))", "sofa (left)", "sofa"),
        ("a ((b)", "b", "a ("),
        ("Stuhl (Rote Box)", "Rote Box", "Stuhl"),
        ("a (b))", *["a (b))"] * 2),
        ("a > b (c, d)", "c, d", "a > b"),
    ],
)
def test_mention_and_name(text, mention, name):
    parsed = parse(dtr(f'{D}<3d_box center="1,-.5,+2.">{text}</3d_box>'), "dtr")
    assert parsed.well_formed and parsed.boxes == [(mention, name, (1.0, -0.5, 2.0))]


def test_ill_formed_responses_keep_what_could_be_read():
    block = f"<detect>Find 3 relevant objects:\n{BOX}\nhm\n{BOX2}</detect>"
    parsed = parse(block + " so <answer>B</answer><answer>C</answer>", "dtr")
    assert not parsed.well_formed and parsed.count == 3 and parsed.frame is None
    assert parsed.boxes == [
        ("red bbox", "chair", (0.3, -0.81, 3.32)),
        ("blue point", "table", (1.0, 0.5, 2.0)),
    ]
    assert parsed.think is None and parsed.answer == "B"
    header = "After aligning to the reference frame 10, find 2 relevant objects:"
    parsed = parse(f"<detect>{header}</detect><think>a", "dtr")
    assert (parsed.frame, parsed.count, parsed.boxes, parsed.think, parsed.answer) == (
        10,
        2,
        [],
        None,
        None,
    )
    assert parse(f"<detect>{BOX}</detect>", "dtr").boxes[0][0] == "red bbox"
    assert parse("I say <answer> 3 </answer>", "lor").answer == " 3 "


# ---- Answers


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "({})",
        "[{}]",
        "{{{}}}",
        "{}.",
        "{})",
        "{}:",
        " {} ",
        "\n({})\t",
        "{}. some text",
        "({}) some text",
        "{}) some text",
        "{}. two\nlines",
        "({})\tA or C",
        " {}. x ",
    ],
)
def test_choice_forms_accepted(form):
    for letter in "ABCDE":
        others = [other for other in "ABCDE" if other != letter]
        for said in (form.format(letter), form.format(letter.lower())):
            assert answer_score(said, letter) == 1.0
            assert [answer_score(said, other) for other in others] == [0.0] * 4


@pytest.mark.parametrize(
    "said",
    [
        "",
        " ",
        "A or B",
        "B or A",
        "AB",
        "BB",
        "B chair",
        "Answer: B",
        "(B",
        "B]",
        "[B] chair",
        "{B} chair",
        "B: chair",
        "B.chair",
        "(B)chair",
        "B)chair",
        "( B )",
        "(B).",
        "B..",
        "B .",
        '"B"',
        "'B'",
        "*B*",
        "\\text{B}",
        "Option B",
        "the B",
        "B,",
        "B;",
        "-B",
        "\uff22",
        "\u0412",
        "B\0",
        "B\u200b",
        "(B]",
        "b or c",
        "B/C",
        "1",
        "None",
        "\ud800",
    ],
)
def test_choice_forms_rejected(said):
    assert answer_score(said, "B") == 0.0


def closed(x, g):
    return max(
        0.0, (math.exp(-2 * abs(x - g) / (abs(g) + 0.01)) - math.exp(-2)) / (1 - math.exp(-2))
    )


def test_number_score_is_the_closed_form():
    # By hand, g = 1.99, x = .99: r = .5, (e^-1 - e^-2) / (1 - e^-2) = .2325442 / .8646647 =
    # .2689414
    assert answer_score("0.99", "1.99") == pytest.approx(0.2689414, abs=1e-6)
    for g in ("2", "-3.5", "0", "0.01", "120", "1"):
        assert answer_score(g, g) == 1.0
        for x in ("0", "0.1", "-1", "1.9", "2.2", "-3", "119.99", "1000", "000.5"):
            assert answer_score(x, g) == pytest.approx(closed(float(x), float(g)), abs=1e-12)
    for g in (0.5, 2.0, 37.0):
        assert answer_score("0", str(g)) < 0.01 and answer_score(str(2 * g), str(g)) < 0.01
    assert answer_score("0.01", "0") == 0.0 and answer_score("0.005", "0") == pytest.approx(
        0.2689414, abs=1e-6
    )


UNIT_TABLE = [
    ("m", 1),
    ("cm", 0.01),
    ("mm", 0.001),
    ("km", 1000),
    ("ft", 0.3048),
    ("feet", 0.3048),
    ("in", 0.0254),
    ("inch", 0.0254),
    ("inches", 0.0254),
    ("meter", 1),
    ("meters", 1),
    ("metre", 1),
    ("metres", 1),
    ("centimeter", 0.01),
    ("centimeters", 0.01),
    ("centimetre", 0.01),
    ("centimetres", 0.01),
    ("degree", 1),
    ("degrees", 1),
]


@pytest.mark.parametrize("unit, factor", UNIT_TABLE)
def test_units(unit, factor):
    truth = f"{1.5 * factor:.6f}"
    for said in (f"1.5 {unit}", f"1.5{unit}", f"1.5 {unit.upper()}.", f" +1.5  {unit.title()} "):
        assert answer_score(said, truth) == pytest.approx(1.0, abs=1e-9)
        assert answer_score(truth, said) == pytest.approx(1.0, abs=1e-9)
    assert answer_score(f"1.5 {unit} x", truth) == 0.0 and answer_score(f"{unit} 1.5", truth) == 0.0


def test_exact_units():
    for said, truth in (("57 cm", "0.57"), ("150 CM.", "1.5 m"), ("30", "30 degrees")):
        assert answer_score(said, truth) == 1.0


@pytest.mark.parametrize(
    "said", ["5", "5.", "5.0", "+5", "05", " 5 ", "5 m", "5m.", "5. m", "5.0.", "500 cm", "5\n"]
)
def test_numbers_read(said):
    assert answer_score(said, "5") == 1.0


@pytest.mark.parametrize(
    "said",
    [
        "",
        "five",
        "5 5",
        "5..",
        "5.0..",
        "5 m..",
        "5,0",
        "5e0",
        "5E0",
        "0x5",
        "5_0",
        "nan",
        "inf",
        "1e999",
        "~5",
        "5?",
        "about 5",
        "5 miles",
        "5 foot",
        "5 %",
        "--5",
        "+ 5",
        "5 - 0",
        "\u0665",
        "\uff15",
        "5 \u212am",
        "5 \u017f",
        "\u22125",
        "5 m m",
        "5 to 5",
        "x=5",
        "5 m (left)",
        ".",
        "-",
        "+.",
        "9" * 400,
        "5\0",
        "(5)",
        "5 .",
        "5 m .",
    ],
)
def test_no_numbers(said):
    assert answer_score(said, "5") == 0.0


def test_huge_numbers_and_none_stay_finite():
    big = "9" * 308
    for truth in (
        "0",
        "0.0",
        big,
        "-" + big,
        big + " km",
        "9" * 400,
        "move_up:" + big,
        "move_up:0",
        "B",
        "text",
        "",
    ):
        for said in (
            None,
            "0",
            "-0",
            big,
            "-" + big,
            big + "km",
            "9" * 400,
            f"move_up:{big},move_down:-{big}",
            "move_down:0",
            "\ud800",
        ):
            assert 0.0 <= answer_score(said, truth) <= 1.0
    assert answer_score(None, "B") == answer_score(None, "") == 0.0
    # Unicode folds the Kelvin sign to k and the long s to s; units are ASCII.
    assert answer_score("5 \u212am", "5000") == answer_score("5 meter\u017f", "5") == 0.0


HALF = closed(0.99, 1.99)


@pytest.mark.parametrize(
    "said, truth, expected",
    [
        ("move_right:0.4,rotate_left:30", "move_right:0.4,rotate_left:30", 1.0),
        (
            "rotate_left:30, move_right:0.4",
            "move_right:0.4,rotate_left:30",
            1.0,
        ),  # order and blanks
        (" move_right : 0.4 m , rotate_left: 30 degrees. ", "move_right:0.4,rotate_left:30", 1.0),
        ("move_left:-0.4,rotate_right:-30", "move_right:0.4,rotate_left:30", 1.0),  # signed axes
        ("move_right:0.4", "move_right:0.4,rotate_left:30", (1 + closed(0, 30)) / 2),
        ("move_right:0.99,move_up:1", "move_right:1.99,move_up:1", (HALF + 1) / 2),
        ("move_right:1.99,move_up:1", "move_right:1.99", 1 / 2),  # an axis that does not move
        ("move_right:0.4,move_left:0.4", "move_right:0.4", closed(0, 0.4)),  # both directions net
        ("move_right:3,move_left:1", "move_right:2", 1.0),
        ("move_left:0.4", "move_right:0.4", 0.0),
        ("move_right:0", "move_up:0", 1.0),  # both stand still
        ("move_right:0.1", "move_up:0", 0.0),
        ("rotate_up:10", "rotate_up:10", 1.0),
        ("rotate_down:-10", "rotate_up:10", 1.0),
        ("move_forward:1,move_backward:0,move_down:2", "move_forward:1,move_down:2", 1.0),
        ("move_right:0.4,move_right:0.4", "move_right:0.4", 0.0),  # repeated
        ("move_right:0.4,spin:1", "move_right:0.4", 0.0),
        ("move_right:0.4,", "move_right:0.4", 0.0),
        ("move_right:x", "move_right:0.4", 0.0),
        ("move_right", "move_right:0.4", 0.0),
        ("", "move_right:0.4", 0.0),
        ("move_right:0.4:0.4", "move_right:0.4", 0.0),
        ("move_right=0.4", "move_right:0.4", 0.0),
        ("0.4", "move_right:0.4", 0.0),
        ("move_right:nan", "move_right:0.4", 0.0),
        ("move_right:4e-1", "move_right:0.4", 0.0),
        ("Move_right:0.4", "move_right:0.4", 0.0),
        ("move_right:0.4;rotate_left:30", "move_right:0.4,rotate_left:30", 0.0),
        ("move_right:1", "move_sideways:1", 0.0),
    ],
)
def test_motion(said, truth, expected):
    assert answer_score(said, truth) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "said, truth, expected",
    [
        ("  A Red\n chair. ", "a red chair", 1),
        ("a red chair", "A  red chair.", 1),
        ("a red chair..", "a red chair", 0),
        ("red chair", "a red chair", 0),
        ("", "chair", 0),
        ("ja", "j\u0101", 0),
        ("F", "F", 1),
        ("(F)", "F", 0),
        ("ab", "AB", 1),
        ("1 2", "1  2", 1),
    ],
)
def test_text(said, truth, expected):
    assert answer_score(said, truth) == expected


def test_kinds_of_truth():
    kinds = {
        "choice": ("A", " E ", "\nB", "(A)", "A.", "A)", "[C]", "A. chair", "A) chair", "(b)"),
        "number": (
            "1.5",
            "-3 m",
            "30 degrees.",
            "0",
            "30°",
            "\u22121.5",
            "1,000",
            "2.4 meters away",
        ),
        "motion": ("move_right:0.4,rotate_left:30", "rotate_up:1", "move_up:x"),
        "text": ("F", "a", "AB", "(F)", "A chair", "chair", "nan", "1.5 x", "", "moved", "5,0"),
    }
    for kind, truths in kinds.items():
        assert [srreal.truth_kind(truth) for truth in truths] == [kind] * len(truths)


@pytest.mark.parametrize(
    "truth, same, near, wrong",
    [
        ("(B)", ("B", "b.", "B. chair", "(B)"), (), ("C", "A or B", "Answer: B", "B chair", "AB")),
        ("B. chair", ("B", "(B) lamp"), (), ("chair", "A", "B chair")),
        ("b)", ("B", "(b)"), (), ("C",)),
        ("30°", ("30", "30 degrees", "30 °", "30°."), ("33°",), ("30 %", "-30", "30°°", "30° m")),
        ("\u22121.5", ("-1.5", "\u22121.5 m", "-150 cm"), ("\u22121.6",), ("1.5", "--1.5")),
        ("1,000", ("1000", "1,000 m", "1 km", "1,000.0."), ("1,100",), ("10,00", "1,00", "1000,0")),
        ("2.4 meters away", ("2.4", "240 cm"), ("2.5 m",), ("2.4 m or 3 m", "about 2.4 m", "far")),
        ("about 3 feet tall.", ("3 ft", "36 in"), ("1 m",), ("around 3 feet", "3 feet high")),
        ("~ 5", ("5",), ("5.5",), ("~5.5",)),
        ("Approx. 2 m", ("2",), ("2.1 m",), ("approx. 2.1 m",)),
        ("rotate_left:\u221230°", ("rotate_right:30",), ("rotate_right:28°",), ("30°",)),
        ("1,234,567", ("1234567",), (), ("1234,567", "1,234567", "01,234,567")),
    ],
)
def test_truths_and_answers_are_read_by_one_set_of_rules(truth, same, near, wrong):
    assert answer_score(truth, truth) == 1.0
    assert [answer_score(said, truth) for said in same] == [pytest.approx(1.0)] * len(same)
    assert all(0.3 < answer_score(said, truth) < 1.0 for said in near)
    assert [answer_score(said, truth) for said in wrong] == [0.0] * len(wrong)


def test_a_target_says_a_number_as_an_answer_has_to():
    """What SFT teaches earns everything: the words around a true number are left out."""
    for truth, answer in (
        ("about 2.4 meters away", "2.4 meters"),
        ("(B)", "(B)"),
        (" 3 m", " 3 m"),
    ):
        e = Example("a", "lor", ["a.png"], "?", truth, rationale="so")
        assert parse(target(e), "lor").answer == answer and score(target(e), e).total == 1.0
    # As it stands where nothing is reasoned.
    e = Example("a", "direct", ["a.png"], "?", "about 2.4 meters away")
    assert target(e) == e.answer and score(target(e), e).total == 1.0


# ---- Detection


def test_distance_steps_and_ties_by_integer_arithmetic():
    """Centres lie on the 0.01 m grid, so in centimetres everything is an integer, and a tie is
    exact."""
    rng, ties = random.Random(1), 0
    triples = [
        (6, 8, 0),
        (2, 6, 9),
        (12, 16, 0),
        (10, 20, 20),
        (24, 32, 0),
        (20, 40, 40),
        (36, 48, 0),
        (60, 80, 0),
        (28, 96, 0),
        *((t, 0, 0) for t in (10, 20, 30, 40, 60, 100)),
    ]
    for i in range(4000):
        offset = (
            triples[i % len(triples)] if i % 2 else tuple(rng.randint(-70, 70) for _ in range(3))
        )
        base = [rng.randint(-900, 900) for _ in range(3)]
        said = [b + o for b, o in zip(base, offset, strict=True)]
        square = sum(o * o for o in offset)
        ties += square in (100, 400, 900, 1600, 3600, 10000)
        expected = next(
            (
                s
                for t, s in ((10, 1.0), (20, 0.8), (30, 0.6), (40, 0.4), (60, 0.2), (100, 0.1))
                if square < t * t
            ),
            0.0,
        )
        xyz = ",".join(str(v / 100) for v in said)
        text = dtr(f'{D}<3d_box center="{xyz}">chair (red bbox)</3d_box>')
        scores = score(text, one(objects={"red bbox": tuple(b / 100 for b in base)}))
        assert scores.detect == expected, (base, offset)
        assert scores.total == pytest.approx(0.9 + 0.1 * expected, abs=1e-12)
    assert ties > 1500


def boxes(*pairs, frame=None):
    lines = [f'<3d_box center="{x},0,2">thing ({m})</3d_box>' for m, x in pairs]
    head = "Find" if frame is None else f"After aligning to the reference frame {frame}, find"
    return dtr("\n".join([f"{head} {len(lines)} relevant objects:", *lines]))


def test_matching():
    two = one(objects={"red bbox": (0, 0, 2), "blue bbox": (5, 0, 2)})

    def detect(*pairs, **more):
        return score(boxes(*pairs, **more), two).detect

    assert (
        detect(("red bbox", 0), ("blue bbox", 5))
        == detect(("BLUE bbox", 5), ("Red Bbox", 0))
        == 1.0
    )
    assert detect(("red bbox", 0)) == 0.5
    assert detect(("red bbox", 0), ("blue bbox", 5.15)) == pytest.approx(0.9)
    assert detect(("red bbox", 0), ("blue bbox", 5), ("green bbox", 1)) == pytest.approx(2 / 3)
    assert detect(("red bbox", 9), ("red bbox", 0), ("blue bbox", 5)) == pytest.approx(
        1 / 3
    )  # the first counts
    assert detect(("red bbox", 5), ("blue bbox", 0)) == 0.0
    assert detect(("red bbox.", 0), ("a red bbox", 0), ("red  bbox", 0)) == 0.0
    assert (
        detect(("red bbox", 0), ("blue bbox", 5), frame=7) == 1.0
    )  # one view: the header's frame does not matter
    upper = one(objects={"Red BBox": (0, 0, 2)})
    assert score(boxes(("red bbox", 0)), upper).detect == 1.0


def test_matching_in_several_views():
    views = {"red bbox": {0: (0, 0, 2), 10: (1, 0, 2)}, "blue bbox": {10: (5, 0, 2), 3: (7, 0, 2)}}

    def detect(*pairs, frame=None, asked=None):
        return score(boxes(*pairs, frame=frame), one(objects=views, frame=asked)).detect

    both = (("red bbox", 1), ("blue bbox", 5))
    assert (
        detect(*both, frame=10)
        == detect(*both, frame=10, asked=10)
        == detect(*both, frame="0010")
        == 1.0
    )
    assert detect(*both, frame=10, asked=3) == detect(*both, frame=1) == 0.0
    assert detect(*both) == detect(*both, asked=10) == 0.0
    # blue, not known there, still counts
    assert detect(("red bbox", 0), ("blue bbox", 5), frame=0) == 0.5
    assert detect(("red bbox", 0), frame=0, asked=0) == 0.5
    assert detect(("blue bbox", 7), frame=3) == 0.5


def test_mentions_that_differ_in_case_only_share_a_box():
    objects = {"Sofa": (1.0, 0.0, 2.0), "chair": (0.0, 0.0, 1.0), "sofa": (1.0, 0.0, 2.5)}
    e = one(objects=objects)
    for z, points in (("2.0", 1 + 0.2), ("2.5", 0.2 + 1), ("9", 0)):
        text = dtr(f'{D}<3d_box center="1.0,0.0,{z}">a (SOFA)</3d_box>')
        assert score(text, e).detect == pytest.approx(points / 3)


def test_weights_in_the_order_of_the_rewards():
    e = one(objects={"red bbox": (0, 0, 2)})
    for example in (e, dataclasses.replace(e, objects={}), dataclasses.replace(e, path="lor")):
        weights = srreal.weights_of(example)
        assert list(weights) == list(srreal.REWARDS)
        scores = score(boxes(("red bbox", 0.15)), example)
        expected = sum(weights[name] * part for name, part in scores.parts.items())
        assert scores.total == pytest.approx(expected, abs=1e-15)
    assert four(Scores(0, *srreal.weights_of(e).values()))[1:] == (0.8, 0.1, 0.1)


def test_totals():
    near = boxes(("red bbox", 0.15))
    e = one(objects={"red bbox": (0, 0, 2)})
    assert four(score(near, e)) == pytest.approx((0.98, 1, 1, 0.8))
    wrong = dataclasses.replace(e, answer="C")
    assert four(score(near, wrong)) == pytest.approx((0.18, 0, 1, 0.8))
    bare = dataclasses.replace(e, objects={})
    assert four(score(near, bare)) == pytest.approx((1.0, 1, 1, 0))
    wrong = dataclasses.replace(bare, answer="C")
    assert four(score(near, wrong)) == pytest.approx((0.2, 0, 1, 0))
    half = score(lor(answer="0.99"), one(path="lor", answer="1.99"))
    assert four(half) == pytest.approx((0.8 * HALF + 0.2, HALF, 1, 0))
    assert score(lor(), e) == score(near, dataclasses.replace(e, path="lor")) == Scores(0, 0, 0, 0)


# ---- A fork: one function and one entry, one object


def test_a_fork_adds_a_path_and_a_reward(monkeypatch):
    short = srreal.Path(
        ("plan", "answer"),
        "Plan, then answer.",
        {"accuracy": 0.9, "format": 0.1},
        {"accuracy": 0.5, "format": 0.5},
    )
    monkeypatch.setitem(srreal.PATHS, "plan", short)
    monkeypatch.setitem(srreal.SECTIONS, "plan", ("your plan", lambda example: "look"))
    e = Example("e", "plan", ["a"], "Q?", "B")
    assert "<plan>your plan</plan>\n<answer>" in prompt(e)
    assert target(e) == "<plan>look</plan>\n<answer>B</answer>"
    assert four(score(target(e), e)) == (1.0, 1.0, 1.0, 0.0)
    assert parse(target(e), "plan").sections["plan"] == "look"
    # its tags are now tags of another path
    assert not parse(lor(think="<plan>"), "lor").well_formed


def test_weights_name_rewards_and_sum_to_one():
    for path in srreal.PATHS.values():
        for weights in (path.weights, path.weights_without_objects):
            assert set(weights) <= set(srreal.REWARDS) and sum(weights.values()) == pytest.approx(
                1.0, abs=1e-15
            )
        assert set(path.sections) <= set(srreal.SECTIONS)


# ---- Untrusted text

PIECES = [
    "<detect>",
    "</detect>",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    BOX,
    BOX2,
    "Find 1 relevant objects:",
    "\n",
    "\r\n",
    " ",
    "\0",
    "\ud800",
    "After aligning to the reference frame 1, find 2 relevant objects:",
    "(",
    ")",
    '">',
    "</3d_box>",
    '<3d_box center="',
    ",",
    "9" * 30,
    "nan",
    "B",
    "1e999",
    "\u0661",
    "\u2028",
    "\x1c",
    "move_up:1",
    "1.5 m",
    "(red bbox)",
    "first image",
]
SEEDS = [
    dtr(f"Find 2 relevant objects:\n{BOX}\n{BOX2}"),
    dtr(f"After aligning to the reference frame 1, find 1 relevant objects:\n{BOX}"),
    lor(),
    lor(answer="move_up:1,rotate_left:20"),
    dtr(D + BOX, answer="1.5"),
]


def mutate(rng, text):
    for _ in range(rng.randint(0, 3)):
        i, j = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        text = rng.choice(
            [
                text[:i] + rng.choice(PIECES) + text[i:],
                text[:i] + text[min(j, i + 9) :],
                text[:j] + text[i:],
                text[:i] + chr(rng.randint(0, 127)) + text[i + 1 :],
                text.replace(*rng.sample(PIECES, 2), 1),
            ]
        )[:900]
    return text


def test_fuzz():
    rng = random.Random(0)
    views = {"red bbox": {0: (0, 0, 2), 1: (0.3, -0.81, 3.32)}, "blue point": {1: (1, 0.5, 2)}}
    flat = {"red bbox": (0.3, -0.81, 3.32), "blue point": (1, 0.5, 2)}
    examples = [
        one(path=path, answer=answer, objects=objects)
        for path in ("lor", "dtr", "direct")
        for objects in (flat, views, {})
        for answer in ("B", "1.5", "0", "move_up:1", "chair")
    ]
    well = 0
    for i in range(24_000):
        text, e = mutate(rng, SEEDS[i % 5]), examples[rng.randrange(len(examples))]
        parsed, strict, official = (
            parse(text, e.path),
            score(text, e),
            score(text, e, rules="official"),
        )
        assert all(math.isfinite(part) and 0.0 <= part <= 1.0 for part in strict), (text, strict)
        assert isinstance(official, Scores) and not math.isinf(official.total)
        assert score(text, e) == strict and parse(text, e.path) == parsed
        if e.path == "direct":
            assert parsed.answer == text and parsed.well_formed == (text.strip() != "")
            continue
        assert parsed.well_formed == reads(text, e.path), repr(text)
        assert strict.format == parsed.well_formed and (parsed.well_formed or strict.total == 0)
        well += parsed.well_formed
        if parsed.well_formed:  # reading what was read changes nothing
            head = f"<detect>{parsed.sections['detect']}</detect>" if e.path == "dtr" else ""
            assert (
                parse(
                    f"{head}<think>{parsed.think}</think><answer>{parsed.answer}</answer>", e.path
                )
                == parsed
            )
    assert well > 2000


N = 200_000  # a quadratic reader would need 4 * 10^10 steps, and hang


@pytest.mark.parametrize(
    "text",
    [
        "<" * N,
        "(" * N,
        ")" * N,
        "(" * (N // 2) + ")" * (N // 2),
        "0" * N,
        " " * N,
        "\n" * N,
        "," * N,
        "5" + " " * N + "x",
        "-" * N,
        "." * N,
        "a:" * (N // 2),
        "0" * (N // 2) + "." + "0" * (N // 2) + "x",
        "B. " + " " * N + "\0",
        "<detect>" * (N // 8),
        "</detect><think>" * (N // 16),
        "</think><answer>" * (N // 16),
        "<detect>" + "</detect><think></think><answer>" * (N // 32),
        "<think></think><answer>" * (N // 23),
        '<3d_box center="' * (N // 16),
        '<3d_box center="1">' * (N // 19),
        "move_up:1," * (N // 10),
        "\n ".join(["x"] * (N // 3)),
        "< / >" * (N // 5),
        BOX * (N // len(BOX)),
        (BOX + "\n") * (N // len(BOX)),
        "\ud800" * N,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_long_garbage_is_read_in_linear_time(text):
    name, centre = f'<3d_box center="1,2,3">{text})</3d_box>', f'<3d_box center="{text}">a</3d_box>'
    cases = [
        (response, "dtr", "B") for response in (text, dtr(text), dtr(D + name), dtr(D + centre))
    ]
    cases += [(text, "lor", "B"), (lor(think=text), "lor", "B")]
    cases += [(lor(answer=text), "lor", truth) for truth in ("B", "1.5", "move_up:1", "text")]
    for response, path, truth in cases:
        e = one(path=path, answer=truth)
        assert 0.0 <= score(response, e).total <= 1.0
        score(response, e, rules="official")


def test_changed_weights_leave_the_others_in_proportion():
    objects = {"red bbox": (0.0, 0.0, 2.0)}
    dtr = Example("a", "dtr", [], "Which?", "A", objects=objects)
    lor = Example("a", "lor", [], "Which?", "A")
    direct = Example("a", "direct", [], "Which?", "A")
    weights = srreal.weights_of(dtr, {"detect": 0.3})
    assert weights["accuracy"] == pytest.approx(0.7 * 8 / 9)
    assert weights["format"] == pytest.approx(0.7 / 9)
    assert weights["detect"] == 0.3 and sum(weights.values()) == pytest.approx(1.0)
    assert srreal.weights_of(dtr, {"detect": 0.0})["accuracy"] == pytest.approx(8 / 9)
    assert srreal.weights_of(lor, {"detect": 0.3}) == srreal.weights_of(lor)
    assert srreal.weights_of(direct, {"accuracy": 0.3}) == srreal.weights_of(direct)
    far = '<detect>Find 1 relevant objects:\n<3d_box center="0,0,9">chair (red bbox)</3d_box></detect>'
    text = f"{far}<think>so</think><answer>A</answer>"
    assert srreal.total_of(srreal.score(text, dtr).parts, dtr, {"detect": 0.3}) == pytest.approx(
        0.7
    )
