r"""LaTeX truths: what equals them, and what is tried to earn their points without knowing them."""

import signal
import sys
import threading

import pytest

import latex
from srreal import Example, answer_score, score, truth_kind

needs_math_verify = pytest.mark.skipif(not latex.is_installed(), reason="without math-verify")
SURD = r"2 \sqrt { 221 }"  # as Geometry3K writes it

EQUAL = [
    (SURD, r"2\sqrt{221}"),
    (SURD, r" $2\sqrt{221}$. "),
    (SURD, r"\boxed{2\sqrt{221}}"),
    (SURD, r"\sqrt{884}"),
    (SURD, "2√221"),
    (SURD, r"\frac{4\sqrt{221}}{2}"),
    (r"\frac { 1 } { 2 }", "1/2"),
    (r"\frac { 1 } { 2 }", "0.5"),
    (r"\frac{1}{3}", "0.333333"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac 12", r"\dfrac{1}{2}"),
    (r"36 \pi", "36π"),
    (r"1,000\pi", r"1000\pi"),
    (r"30^\circ", "30°"),
    (r"30^\circ", "30 degrees"),
    (r"50\%", "50"),
    ("$12", "12"),
    ("x^2+2x+1", "(x+1)^2"),
    ("a^2 b", "b a^{2}"),
    ("y = x^2", "x^2"),
    ("x^2 + y^2 = 4", "2x^2 + 2y^2 = 8"),
    (r"x \geq 2^2", "x >= 4"),
    (r"\{1, 2^2\}", r"\{4, 1\}"),
    (r"(2, \sqrt{3})", r"(2,\sqrt{3})"),
    (r"\text{even}", "even"),
    (r"2\sqrt{3}", r"2\sqrt{3} \text{ cm}"),
    (r"2\sqrt{3} \text{ cm}^2", r"2\sqrt{3} cm^2"),
]

DIFFERENT = [
    (SURD, "29.73"),
    (SURD, r"3\sqrt{221}"),
    (SURD, r"-2\sqrt{221}"),
    (SURD, r"2\sqrt{221} x"),
    ("x^2", "x^3"),
    (r"\frac{1}{3}", "0.33"),
    (r"(2, \sqrt{3})", r"(\sqrt{3}, 2)"),
    (r"\pm 2\sqrt{3}", r"2\sqrt{3}"),
    (r"1, 2\sqrt{3}", r"2\sqrt{3}"),
    (r"1, 2\sqrt{3}", "1, 1"),
    ("y = x^2", "y = x^3"),
    ("y = x^2", "y = y"),
    # Neither has a solution.
    ("x^2 + 1 = 0", "x^2 + 2 = 0"),
    (r"x \geq 2^2", "x > 4"),
    (r"\angle ABC", r"\angle ACB"),
    (r"2\sqrt{3} \text{ cm}", r"2\sqrt{3} \text{ m}"),
    # Six decimals of it are 0.
    ("10^{-8}", "0.0"),
]

HACKS = [
    "",
    " ",
    "$$",
    r"\boxed{}",
    # several answers
    r"2\sqrt{221} or 3",
    r"3 and 2\sqrt{221}",
    r"3, 2\sqrt{221}",
    r"3; 2\sqrt{221}",
    r"3 = 2\sqrt{221}",
    r"x = 2\sqrt{221}",
    r"3 \approx 2\sqrt{221}",
    r"\pm 2\sqrt{221}",
    r"\{2\sqrt{221}\}",
    r"\{3, 2\sqrt{221}\}",
    r"$3$ $2\sqrt{221}$",
    r"\boxed{3}\boxed{2\sqrt{221}}",
    r"\boxed{2\sqrt{221}} or \boxed{3}",
    r"\begin{cases} 3 \\ 2\sqrt{221} \end{cases}",
    r"\max(3, 2\sqrt{221})",
    # the truth among words
    r"the answer is 2\sqrt{221}",
    r"answer: $2\sqrt{221}$",
    r"2\sqrt{221} \text{ or maybe } 3",
    "3\n2\\sqrt{221}",
    # what is no number, or any
    "nan",
    "x",
    r"\infty",
    r"\frac{0}{0}",
    r"\frac{1}{0}",
    # what can't be read
    r"2\sqrt{221",
    r"}2\sqrt{221}{",
    "\ud800\0",
    # what takes for ever
    "9^9^9^9",
    "9^{9^{9^9}}",
    "((((9^9)^9)^9)^9)^9",
    "9^{(9^{(9)})}",
    "e^{e^{e^{e}}}",
    "10^{1000000000}",
    "1000000000!",
    r"\sum_{k=1}^{1000000000} k",
    r"\binom{1000000}{500000}",
    "(x+1)^{9999}",
    "(" * 400 + "1" + ")" * 400,
    "1+" * 5000 + "1",
]


@needs_math_verify
@pytest.mark.parametrize("truth, answer", EQUAL)
def test_another_form_of_the_truth_is_right(truth, answer):
    assert answer_score(answer, truth) == 1.0


@needs_math_verify
@pytest.mark.parametrize("truth, answer", DIFFERENT)
def test_another_value_is_wrong(truth, answer):
    assert answer_score(answer, truth) == 0.0


@needs_math_verify
@pytest.mark.parametrize("answer", HACKS, ids=range(len(HACKS)))
def test_hacks_earn_nothing(answer):
    assert answer_score(answer, SURD) == 0.0


BOMB = "9^{9^{9^9}}"  # as a truth no rule of ours refuses it


@needs_math_verify
def test_a_comparison_without_end_is_ended_and_the_next_is_answered():
    comparer = latex.Comparer()
    assert comparer.ask("x^2", "x^{2}")
    first = comparer.process.pid
    assert not comparer.ask(BOMB, "2")
    assert comparer.process is None
    assert comparer.ask("x^2", "x^{2}") and comparer.process.pid != first
    comparer.stop()


@needs_math_verify
def test_a_reply_that_nobody_waited_for_is_not_the_next_ones():
    def interrupt(signum, frame):
        raise KeyboardInterrupt

    comparer = latex.Comparer()
    comparer.ask("x^2", "x^{2}")
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        # It comes while the other process computes, which takes until it is ended.
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            comparer.ask(BOMB, "2")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert comparer.process is None
    assert comparer.ask("x^2", "x^{2}") and not comparer.ask("x^2", "x^3")
    comparer.stop()


@needs_math_verify
def test_it_answers_in_threads_and_leaves_signals_alone():
    handler = signal.getsignal(signal.SIGALRM)
    found = []
    pairs = [("x^2", f"x^{k}") for k in range(8)]

    def ask(pair):
        found.append((pair[1], latex.equal(*pair)))

    threads = [threading.Thread(target=ask, args=[pair]) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(f"x^{k}", k == 2) for k in range(8)]
    assert signal.getsignal(signal.SIGALRM) is handler


@needs_math_verify
def test_a_completion_is_scored_by_it():
    example = Example("e", "lor", ["a.png"], "Find x.", SURD)
    right = score(r"<think>Pythagoras.</think><answer>\sqrt{884}</answer>", example)
    wrong = score("<think>Pythagoras.</think><answer>29</answer>", example)
    assert (right.total, wrong.total) == (1.0, 0.2)


@pytest.mark.parametrize("truth", [SURD, "x^2", "$5$", r"\text{even}", r"\angle ABC", "ab^2 + cd"])
def test_a_truth_with_these_signs_is_latex(truth):
    assert latex.is_latex(truth) and truth_kind(truth) == "text"


@pytest.mark.parametrize(
    "truth", ["even", "a chair", "The tag says that it costs $5.", r"see \\server\share " * 20]
)
def test_words_are_not(truth):
    assert not latex.is_latex(truth)


@pytest.mark.parametrize("truth", ["B. $5", "30°", "1.5", "move_right:0.4"])
def test_other_kinds_of_truth_stay_what_they_are(truth):
    assert truth_kind(truth) != "text"
    assert answer_score(truth, truth) == 1.0


def test_without_the_package_equal_texts_are_equal_and_nothing_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert not latex.is_installed()
    assert answer_score(r"2\sqrt{221}", SURD) == 1.0
    assert answer_score(r"\sqrt{884}", SURD) == 0.0
