"""Graders on what models really write: tables of texts with their verdicts, and properties over any text."""

import logging
import subprocess
import sys
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_lab.evaluation.checking import (
    boxed,
    check_aime,
    check_choice,
    check_contains,
    check_exact,
    check_math,
    normalise,
    permute_choices,
    read_answer,
)
from dms_lab.evaluation.math_worker import MathWorker, Result
from dms_lab.evaluation.verdict import Verdict


@pytest.fixture(scope="module")
def verify():
    pytest.importorskip("math_verify", reason="math-verify is the optional extra eval")
    with MathWorker() as worker:
        yield lambda gold, text: worker.verify(gold, text, 60)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Let me think.</think>\n\n73", "\n\n73"),
        ("<think>Let me think.</think>73", "73"),
        ("I must write </think> when I am done. Done.</think>73", "73"),
        ("The token </think> ends a thought", " ends a thought"),
        ("Let me think about \\boxed{73}", None),
        ("", None),
        ("Done.</think>72<think>Wait, no", None),
        ("Done.</think>72<think>Wait, no.</think>73", "73"),
        ("Done.</think>", ""),
        ("Done.</think> 4<|im_end|>", " 4<|im_end|>"),
    ],
)
def test_the_answer_is_what_follows_the_last_end_of_thought(text, expected):
    assert read_answer(text, "</think>") == expected


def test_without_a_thought_all_is_answer():
    assert read_answer("<think>4</s>", None) == "<think>4</s>"
    assert read_answer(" 4\n", None) == " 4\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so $\boxed{73}$.", ["73"]),
        (r"\boxed{1} and \fbox{2}", ["1", "2"]),
        (r"\boxed{\frac{1}{2}}", [r"\frac{1}{2}"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{\left\{ x \right.}", [r"\left\{ x \right."]),
        (r"\boxed{x = \boxed{5}}", [r"x = \boxed{5}", "5"]),
        (r"\boxed 5$", ["5"]),
        (r"\boxed5.", ["5."]),
        (r"\boxed {5}", ["5"]),
        (r"\boxed{5", []),
        (r"\boxed{4} then \boxed{5", ["4"]),
        (r"\boxed{ \boxed{5}", ["5"]),
        (r"{ \boxed{5}", ["5"]),
        (r"} \boxed{5} }", ["5"]),
        (r"\boxed{}", [""]),
        (r"\boxedtext{5}", []),
        (r"\boxed{a\\}", [r"a\\"]),
        (r'{"answer": "\\boxed{C}"}', ["C"]),
        ("no box", []),
    ],
)
def test_boxes_are_found_with_balanced_braces(text, expected):
    assert boxed(text) == expected


BALANCED = st.recursive(
    st.text("ab1 ,.$^_\n", max_size=6), lambda inner: st.builds("{0}{{{1}}}{0}".format, inner, inner), max_leaves=6
) | st.sampled_from([r"\{", r"\}\\", r"\frac{1}{2}", r"\left\{"])


@given(st.lists(BALANCED, max_size=4))
def test_any_balanced_content_comes_out_as_it_went_in(contents):
    assert boxed(" ".join(rf"then \boxed{{{content}}}" for content in contents)) == contents


AIME = [
    (r"Therefore $m + n = \boxed{73}$.", "73", 1, "73"),
    (r"**Final answer:** \boxed{073}", "73", 1, "73"),
    (r"\boxed{73}", "073", 1, "73"),
    (r"\boxed{\text{73}}", "73", 1, "73"),
    (r"\boxed{\textbf{73}}", "73", 1, "73"),
    (r"\boxed{\mathbf{73}}", "73", 1, "73"),
    (r"\boxed{$73$}", "73", 1, "73"),
    (r"\boxed{73^\circ}", "73", 1, "73"),
    (r"\boxed{73^{\circ}}", "73", 1, "73"),
    (r"\boxed{73.}", "73", 1, "73"),
    (r"\boxed{73.0}", "73", 1, "73"),
    (r"\boxed{ 73 }", "73", 1, "73"),
    ("\\boxed{\n73\n}", "73", 1, "73"),
    (r"\boxed{m+n=73}", "73", 1, "73"),
    (r"\boxed{x = 73}", "73", 1, "73"),
    (r"\boxed{73 \text{ degrees}}", "73", 1, "73"),
    (r"\boxed{73\%}", "73", 1, "73"),
    (r"\boxed{\$73}", "73", 1, "73"),
    (r"\boxed 73$", "73", 1, "73"),
    (r"\fbox{73}", "73", 1, "73"),
    (r"\boxed{\boxed{73}}", "73", 1, "73"),
    (r"First I had \boxed{72}, but the sum is \boxed{73}.", "73", 1, "73"),
    (r"I had \boxed{73}, but the sum is \boxed{72}.", "73", 0, "72"),
    (r"\boxed{0}", "0", 1, "0"),
    (r"\boxed{000}", "000", 1, "0"),
    (r"\boxed{999}", "999", 1, "999"),
    (r"\boxed{730}", "73", 0, "730"),
    (r"\boxed{1{,}024}", "24", 0, "1024"),
    (r"\boxed{1,024}", "24", 0, "1024"),
    (r"\boxed{1073}", "73", 0, "1073"),
    (r"\boxed{-73}", "73", 0, "-73"),
    (r"\boxed{73.5}", "73", 0, "73.5"),
    (r"\boxed{\frac{73}{2}}", "73", 0, r"\frac{73}{2}"),
    (r"\boxed{12, 73}", "73", 0, "12,73"),
    (r"\boxed{73", "73", 0, None),
    (r"\boxed{}", "73", 0, None),
    ("The answer is 73.", "73", 0, None),
    ("", "73", 0, None),
    (r"\boxed{" + "9" * 1500 + "}", "73", 0, "9" * 1500),
    (r"\boxed{" + "9" * 5000 + "}", "73", 0, None),
    ("\\boxed{\u0667\u0663}", "73", 0, "\u0667\u0663"),
]


@pytest.mark.parametrize(("text", "gold", "score", "answer"), AIME)
def test_aime_takes_the_integer_of_the_last_box(text, gold, score, answer):
    verdict = check_aime(text, gold)
    assert (verdict.score, verdict.answer) == (score, answer)
    assert bool(verdict.note) == (answer is None or not answer.isdecimal() or len(answer) > 3 or not answer.isascii())


@pytest.mark.parametrize(
    ("text", "said", "score", "answer", "note"),
    [
        (r"\boxed{73}", Result(True, "73"), 1, "73", ""),
        (r"\boxed{72}", Result(False, "72"), 0, "72", ""),
        (r"\boxed{73}", Result(False, "7"), 1, "73", "by the integer right, by math-verify wrong"),
        (r"\boxed{72}", Result(True, "73"), 0, "72", "by the integer wrong, by math-verify right"),
        (r"\boxed{73}", Result(None, None, "math-verify took longer than 1 s"), 1, "73", "longer than 1 s"),
        (r"\boxed{\frac{146}{2}}", Result(True, "73"), 1, "73", "by the integer wrong, by math-verify right"),
        (r"\boxed{\frac{145}{2}}", Result(False, "145/2"), 0, "145/2", "no integer from 0 to 999"),
        (r"\boxed{9^{9^9}}", Result(None, None, "math-verify's process died"), 0, "9^{9^9}", "died"),
        ("The answer is 73.", Result(True, "73"), 1, "73", "by the integer wrong, by math-verify right"),
        ("I give up.", Result(False), 0, None, "no integer"),
    ],
)
def test_aime_asks_math_verify_second_and_tells_where_it_disagrees(text, said, score, answer, note, caplog):
    with caplog.at_level(logging.WARNING):
        verdict = check_aime(text, "73", lambda gold, read: said)
    assert (verdict.score, verdict.answer) == (score, answer)
    assert note in verdict.note
    assert bool(verdict.note) == bool(note)
    assert bool(caplog.records) == ("by the integer" in note)


def test_aime_and_the_real_math_verify_agree_where_there_is_an_integer(verify):
    for text, gold, score, answer in AIME:
        if answer and answer.isdecimal() and answer.isascii() and len(answer) <= 3:
            assert check_aime(text, gold, verify) == Verdict(score, answer), text
    assert check_aime(r"\boxed{\frac{146}{2}}", "73", verify).score == 1
    assert check_aime("x" * 10_000 + r"\boxed{73}" + " and so on" * 1000, "73", verify) == Verdict(1.0, "73")


MATH = [
    (r"\boxed{\frac{1}{2}}", r"\frac12", 1, "1/2"),
    (r"\boxed{\frac12}", r"\frac{1}{2}", 1, "1/2"),
    (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}", 1, "1/2"),
    (r"\boxed{0.5}", r"\frac{1}{2}", 1, "1/2"),
    (r"\boxed{.5}", "0.5", 1, "1/2"),
    (r"\boxed{1/2}", r"\frac{1}{2}", 1, "1/2"),
    (r"\boxed{\frac{1}{2}.}", r"\frac{1}{2}", 1, "1/2"),
    (r"\boxed{\frac{2}{3}}", r"\frac{1}{2}", 0, "2/3"),
    (r"\boxed{x = 5}", "x=5", 1, "5"),
    (r"\boxed{5}", "x=5", 1, "5"),
    (r"$$\boxed{-5}$$", "5", 0, "-5"),
    (r"\boxed{3\sqrt{13}}", r"3\sqrt{13}", 1, "3*sqrt(13)"),
    (r"\boxed{\sqrt{117}}", r"3\sqrt{13}", 1, "3*sqrt(13)"),
    (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3,\frac{\pi}{2})", 1, "(3, pi/2)"),
    (r"\boxed{(\frac{\pi}{2}, 3)}", r"(3,\frac{\pi}{2})", 0, "Interval.open(pi/2, 3)"),
    (r"\boxed{[3, 4)}", "[3,4)", 1, "Interval.Ropen(3, 4)"),
    (r"\boxed{[3, 4]}", "[3,4)", 0, "Interval(3, 4)"),
    (r"\boxed{(-\infty,2)\cup(3,\infty)}", r"(-\infty, 2) \cup (3, \infty)", 1, None),
    (r"\boxed{x \in [-2,7]}", r"[-2,7]", 1, "Interval(-2, 7)"),
    (r"\boxed{\{7, 3, 5\}}", "3, 5, 7", 1, "{3, 5, 7}"),
    (r"$\boxed{3}$, $\boxed{5}$ and $\boxed{7}$", "3, 5, 7", 1, "{3, 5, 7}"),
    (r"\boxed{x = 1} \text{ or } \boxed{x = -2}", "1,-2", 1, None),
    (r"I had \boxed{72}, but the sum is \boxed{73}.", "73", 1, "73"),
    (r"I had \boxed{73}, but the sum is \boxed{72}.", "73", 0, "72"),
    (r"\fbox{73}", "73", 1, "73"),
    (r"$\boxed{3}$. Let me check. Yes: $\boxed{7}$", "7", 1, "7"),
    (r"\boxed{1 + \sqrt{19}, 1 - \sqrt{19}}", r"1 \pm \sqrt{19}", 1, None),
    (r"\boxed{\begin{pmatrix}1 & 0 \\ 0 & 1\end{pmatrix}}", r"\begin{pmatrix}1&0\\0&1\end{pmatrix}", 1, "[[1, 0], [0, 1]]"),
    (r"\boxed{\begin{bmatrix} 0.2 \\ 2 \end{bmatrix}}", r"\begin{pmatrix} 1/5 \\ 2 \end{pmatrix}", 1, "[[1/5], [2]]"),
    (r"\boxed{\begin{pmatrix} 1 & 0 \\ 0 & 2 \end{pmatrix}}", r"\begin{pmatrix}1&0\\0&1\end{pmatrix}", 0, None),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", 1, "evelyn"),
    (r"\boxed{Evelyn}", r"\text{Evelyn}", 1, "evelyn"),
    (r"\boxed{\text{Angela}}", r"\text{Evelyn}", 0, "angela"),
    (r"\boxed{\textbf{(C)}}", r"\text{(C)}", 1, "c"),
    (r"\boxed{C}", r"\text{(C)}", 1, None),
    (r"\boxed{864}", r"864 \mbox{ inches}^2", 1, "864"),
    (r"\boxed{15\text{ cm}^2}", r"15\mbox{ cm}^2", 1, "15"),
    (r"\boxed{90}", r"90^\circ", 1, "90"),
    (r"\boxed{10\%}", "10", 1, "10"),
    (r"\boxed{10}", r"10\%", 1, "10"),
    (r"\boxed{0.1}", "10", 0, "1/10"),
    (r"\boxed{32348}", r"\$32,\!348", 1, "32348"),
    (r"\boxed{58{,}500}", "58,500", 1, "58500"),
    (r"\boxed{y = 3 + 2x}", "y = 2x + 3", 1, "2*x + 3"),
    (r"\boxed{(b+2)(a+5)}", "(a+5)(b+2)", 1, None),
    (r"\boxed{6 - 5i}", "6-5i", 1, None),
    (r"\boxed{6 + 5i}", "6-5i", 0, None),
    (r"\boxed{1\frac{4}{5}}", r"\frac{9}{5}", 1, "9/5"),
    (r"\boxed{6.72 \times 10^{-5}}", ".0000672", 1, "21/312500"),
    ("The final answer is $5$.", "5", 1, "5"),
    (r"\boxed{5", "5", 0, None),
    ("I give up.", "5", 0, None),
]


@pytest.mark.parametrize(("text", "gold", "score", "answer"), MATH)
def test_math_is_decided_by_math_verify_and_votes_by_value(verify, text, gold, score, answer):
    verdict = check_math(text, gold, verify)
    assert verdict.score == score
    if answer is not None:
        assert verdict.answer == answer


def test_a_time_limit_scores_nothing_and_votes_by_the_text():
    late = Result(None, None, "math-verify took longer than 10 s")
    assert check_math(r"\boxed{\dfrac 12}", "0.5", lambda *_: late) == Verdict(0.0, r"\frac{1}{2}", late.note)
    assert check_math("5", "5", lambda *_: late) == Verdict(0.0, None, r"no \boxed{}; " + late.note)


def test_a_box_too_long_for_an_answer_is_not_sent_to_math_verify():
    verdict = check_math(r"\boxed{" + "1" * 1_000_000 + "}", "5", lambda *_: pytest.fail("asked"))
    assert verdict == Verdict(0.0, None, "a box of 1000000 characters")


@pytest.mark.parametrize(
    "same",
    [
        [r"\frac{3}{4}", r"\dfrac{3}{4}", r"\frac34", r"\tfrac 34", "3/4", r" \frac{3}{4} .", r"$\frac{3}{4}$"],
        ["0.5", ".5", ".50", "0.500", "x=0.5", r"\$0.5", r"0.5\%", "0.5."],
        ["5", "5.0", "5.", r"5\text{ cm}", r"5 \mbox{ cm}^2", r"5^\circ", r"5^{\circ}", r"\text{5}", r"\(5\)"],
        ["12345", "12,345", r"12,\!345", "12{,}345", r"12\,345"],
        [r"\left(1, 2\right)", "(1,2)", r"( 1,\ 2 )", r"\left(1,\;2\right)"],
        [r"\text{east}", "east", r"\textbf{east}", r"\textbf{\text{east}}", r"\mathrm{east}."],
        [r"2\sqrt3", r"2\sqrt{3}", r"2 \sqrt 3"],
        ["-3", "\N{MINUS SIGN}3", "- 3"],
        [r"x \in [-2,7]", "[-2,7]"],
    ],
)
def test_looks_that_do_not_change_an_answer_are_taken_off(same):
    assert len({normalise(text) for text in same}) == 1


def test_different_answers_stay_different_when_normalised():
    texts = ["5", "-5", "50", "0.5", "5x", r"\frac{5}{2}", "(5,2)", "[5,2)", r"\{5,2\}", r"\sqrt{5}", "5^2", r"\leftarrow"]
    matrices = [r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}12\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"]
    assert len({normalise(text) for text in texts + matrices}) == len(texts + matrices)
    assert normalise(r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}") == matrices[0]


CHOICES = [
    ("Answer: B", "B"),
    ("The field is zero.\n\nAnswer: B", "B"),
    ("answer: b", "B"),
    ("ANSWER: B.", "B"),
    ("**Answer:** B", "B"),
    ("**Answer: B**", "B"),
    ("**Answer**: B", "B"),
    ("Answer: (B)", "B"),
    ("Answer: $B$", "B"),
    (r"Answer: \(B\)", "B"),
    (r"Answer: \boxed{B}", "B"),
    (r"Answer: $\boxed{\text{B}}$", "B"),
    ("Answer: **B**", "B"),
    ("Answer: [B]", "B"),
    ("Answer:\n\nB", "B"),
    ("Final answer: B", "B"),
    ("### Final Answer: **(B)** 5 eV", "B"),
    ("Answer: B) 5 eV", "B"),
    ("Answer: B. The rate doubles.", "B"),
    ("Answer: B, because the rate doubles.", "B"),
    ("Answer: B - the rate doubles", "B"),
    ("Answer: B is right.", "B"),
    ("Answer: Option B", "B"),
    ("Answer: A\nWait, that is wrong.\nAnswer: B", "B"),
    ("Answer: B\n\nI chose it over (A) and \\boxed{C}.", "B"),
    ("Answer: B<|im_end|>", None),
    ("Answer: A and B", None),
    ("Answer: A or B", None),
    ("Answer: A, B", None),
    ("Answer: A/B", None),
    ("Answer: (A) and (B)", None),
    (r"Answer: \boxed{A}, \boxed{B}", None),
    ("Answer: Also", None),
    ("Answer: A molecule with two rings", None),
    ("Answer: BC", None),
    ("Answer: E", None),
    ("Answer: B2", None),
    ("Answer: D_2", None),
    ("Answer: B\n\n**Answer:** it is the second one", "B"),
    (r"So it is \boxed{B}.", "B"),
    (r"\boxed{\text{B}}", "B"),
    (r"\boxed{\textbf{(B)}}", "B"),
    (r"\boxed{(B)}", "B"),
    (r"\boxed{\text{B) } 5\,\text{eV}}", "B"),
    (r"First \boxed{A}, then \boxed{B}", "B"),
    (r"\boxed{B}. The value was \boxed{5}", "B"),
    (r"\boxed{B_2}", None),
    (r"\boxed{(A)^2}", None),
    (r"\boxed{E}", None),
    (r"\boxed{AB}", None),
    (r"\boxed{A, B}", None),
    ('{"answer": "B"}', "B"),
    ('```json\n{\n  "answer": "B"\n}\n```', "B"),
    ("{'answer': 'B'}", "B"),
    ('"answer": "(B)"', "B"),
    ('"answer": "B) 5 eV"', "B"),
    ('"answer": "A", no: "answer": "B"', "B"),
    ('"answer": "Both"', None),
    ('"answer": "A and B"', None),
    ('"answer": "E"', None),
    (r'"answer": "A" is what I write, \boxed{B}', "B"),
    ("The correct answer is B.", "B"),
    ("The correct answer is **(B)**, since it doubles.", "B"),
    ("The best choice is: B", "B"),
    ("The answer is a bit longer.", None),
    ("The answer is A or B.", None),
    ("(B)", "B"),
    ("We rule out the others.\n\n**(B)**\n\nI hope this helps.", "B"),
    ("It cannot be (A).\nSo I go with (B).", "B"),
    ("(A) turns (B) into (C)", None),
    ("It cannot be (A).\nI do not know.", None),
    ("f(B) grows", None),
    ("(E)", None),
    ("I do not know.", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "letter"), CHOICES)
def test_a_choice_is_read_by_the_most_trusted_form_that_is_there(text, letter):
    for gold in "ABCD":
        verdict = check_choice(text, gold)
        assert (verdict.answer, verdict.score) == (letter, float(gold == letter))
        assert bool(verdict.note) == (letter is None)


def test_the_number_of_choices_bounds_the_letters():
    assert check_choice("Answer: J", "J", 10).score == 1
    assert check_choice("Answer: C", "A", 2).answer is None
    with pytest.raises(ValueError, match="gold='E' must be one of A, B, C, D"):
        check_choice("Answer: E", "E")
    with pytest.raises(ValueError, match="num_choices=27"):
        check_choice("Answer: E", "E", 27)


def test_contains_counts_the_share_that_occurs():
    numbers = ["8731", "Blue Fox", "4410"]
    assert check_contains("They are 8731, blue fox and 4410.", numbers) == Verdict(1.0)
    assert check_contains("BLUE FOX", numbers) == Verdict(1 / 3, None, "1 of 3 found")
    assert check_contains("", numbers).score == 0
    assert check_contains("x48731", ["8731"]).score == 1
    for wrong in ([], "8731"):
        with pytest.raises(ValueError, match="list of at least one"):
            check_contains("8731", wrong)


def test_exact_means_to_the_character():
    assert check_exact(" 4", " 4") == Verdict(1.0, " 4")
    for text in ("4", " 4 ", " 4\n", "", " 44"):
        assert check_exact(text, " 4") == Verdict(0.0, text)


def test_gold_of_aime_must_be_such_an_integer():
    with pytest.raises(ValueError, match="gold='1024'"):
        check_aime("", "1024")


MARKS = st.lists(
    st.sampled_from(r"""\boxed{ \fbox } { \ answer: "answer":" (A) A B and , $ 1 = . ^ _ \text{ \frac \left (""".split())
    | st.sampled_from([" ", "\n"])
    | st.text(max_size=3),
    max_size=25,
).map("".join)


@settings(max_examples=300)
@given(MARKS | st.text())
def test_no_text_makes_a_grader_raise(text):
    unsure = Result(None, None, "not sure")
    for verdict in (
        check_aime(text, "73"),
        check_aime(text, "73", lambda *_: unsure),
        check_math(text, "73", lambda *_: unsure),
        check_choice(text, "A"),
        check_contains(text, ["73"]),
        check_exact(text, "73"),
    ):
        assert verdict.answer is None or isinstance(verdict.answer, str)
    assert read_answer(text, "</think>") is None or "</think>" in text
    assert all(content in text for content in boxed(text))


@pytest.mark.parametrize(
    "unit",
    [
        r"\boxed{",
        r"\boxed ",
        r"\boxed{1}, ",
        "{",
        "}",
        "Answer: ",
        '"answer": "',
        "answer is ",
        "(A)\n",
        "\\",
        " ",
        "A",
        "1,",
    ],
)
def test_hundreds_of_kilobytes_of_anything_are_graded_in_seconds(unit):
    text = unit * (300_000 // len(unit))
    started = time.process_time()
    check_aime(text, "73")
    check_math(text, "73", lambda *_: Result(False))
    check_choice(text, "A")
    assert time.process_time() - started < 6


@given(st.text(), st.text(), st.lists(st.text(max_size=3), min_size=1, max_size=6), st.integers())
def test_a_permutation_keeps_every_choice_and_finds_the_correct_one(question, correct, wrong, seed):
    choices, letter = permute_choices(question, correct, wrong, seed)
    assert Counter(choices) == Counter([correct, *wrong])
    assert choices["ABCDEFG".index(letter)] == correct
    assert permute_choices(question, correct, wrong, seed) == (choices, letter)


def test_equal_choices_are_not_mistaken_for_the_correct_one():
    letters = Counter(permute_choices(f"q{i}", "x", ["x", "y", "y"], 0)[1] for i in range(400))
    where = Counter(permute_choices(f"q{i}", "z", ["x", "y", "y"], 0)[1] for i in range(400))
    assert letters == where


def test_every_order_is_equally_likely_and_another_seed_is_another_order():
    def order(i, seed):
        return "".join(permute_choices(f"question {i}", "a", "bcd", seed)[0])

    orders = Counter(order(i, 0) for i in range(4800))
    assert len(orders) == 24
    assert sum((count - 200) ** 2 / 200 for count in orders.values()) < 49.7  # chi-square, 23 degrees, p = 0.001
    same = sum(order(i, 0) == order(i, 1) for i in range(480))
    assert 5 <= same <= 40  # one in 24


def test_the_order_is_the_same_in_every_process():
    code = "from dms_lab.evaluation.checking import *; print(*permute_choices('q\\ud800\u00e9', 'a', 'bcd', 7)[0])"
    here = " ".join(permute_choices("q\ud800\u00e9", "a", "bcd", 7)[0])
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == here
    assert permute_choices("What is 2 + 2?", "4", ["3", "5", "22"], 0) == FROZEN


FROZEN = (["5", "3", "22", "4"], "D")


@pytest.mark.parametrize("wrong", [[], ["x"] * 26])
def test_choices_must_have_letters(wrong):
    with pytest.raises(ValueError, match="wrong choices: give 1 to 25"):
        permute_choices("q", "a", wrong, 0)
