"""Formulas are compared in workers that may hang, die or be lied to; we go on without them."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from jaxreason import types
from jaxreason.rewards import latex
from jaxreason.text.chat import split_reasoning

INJECTION = "__import__('os').system('touch {path}')"


@pytest.fixture(scope="module")
def grader():
    """One pool for the file: a worker takes a second to start."""
    reward = latex.MathVerify(split_reasoning, workers=2, timeout_seconds=0.5)
    yield reward
    reward.close()


def completion(text):
    return types.Completion(text=text, ids=(1,), logprobs=(0.0,), truncated=False)


def score(grader, rows):
    """[(text, gold)] -> (rewards, breakdown)."""
    return grader([completion(text) for text, _ in rows], [gold for _, gold in rows])


# (completion, gold answer, reward)
ADVERSARIAL = [
    # nested, many, cut off and empty boxes
    (r"\boxed{\boxed{5}}", "5", 1),
    (r"\boxed{1 + \boxed{5}}", "5", 1),
    (r"\boxed{4} so \boxed{5}", "5", 1),
    (r"\boxed{5} so \boxed{4}", "5", 0),
    (r"\boxed{5}, wait, \boxed{", "5", 1),
    (r"\boxed{5", "5", 1),  # no box: the last number
    (r"\boxed{}", "5", 0),
    (r"5 \boxed{}", "5", 0),
    (r"\boxed{4, 5}", "5", 0),
    (r"\boxed{4 \text{ or } 5}", "5", 0),
    (r"\boxed{{{5}}}", "5", 1),
    (r"\boxed{5}}}}", "5", 1),
    (r"{{{\boxed{5}", "5", 1),
    (r"\boxed{\}5\{}", "5", 0),
    (r"\boxed" * 50 + r"{5}", "5", 1),
    # the thinking part says nothing
    (r"<think>\boxed{5}</think> nothing", "5", 0),
    (r"<think>\boxed{5}</think> \boxed{4}", "5", 0),
    (r"<think>\boxed{4}</think> \boxed{5}", "5", 1),
    (r"<think>\boxed{5}", "5", 0),
    (r"</think></think>\boxed{5}", "5", 1),
    # towers and other numbers that no machine holds
    (r"\boxed{10^{10^{10}}}", "10", 0),
    ("it is 10^10^10", "10", 0),
    (r"\boxed{9^{9^{9^9}}}", "9", 0),
    (r"\boxed{((9!)!)!}", "9", 0),
    (r"\boxed{\sum_{n=1}^{10^{9}} n!}", "3", 0),
    (r"\boxed{" + "9" * 100_000 + "}", "9", 0),
    (r"\boxed{" + "9" * 100_000 + "}", "9" * 100_000, 1),
    (r"\boxed{" + "(" * 400 + "5" + ")" * 400 + "}", "6", 0),
    ("1e999999999", "1", 0),
    (r"\boxed{\frac{1}{0}}", "1", 0),
    # numbers in other clothes
    (r"\boxed{72 \text{ dollars}}", "72", 1),
    (r"\boxed{72\text{ cm}^2}", "72", 1),
    (r"\boxed{\$1,234.50}", "1234.5", 1),
    (r"\boxed{1{,}234}", "1234", 1),
    (r"\boxed{50\%}", "50", 1),
    (r"\boxed{50\%}", r"\frac{1}{2}", 1),
    (r"\boxed{\frac12}", "0.5", 1),
    (r"\boxed{-\dfrac{3}{4}}", "-0.75", 1),
    (r"\boxed{1\frac{1}{2}}", "3/2", 1),
    ("2 1/2 hours", "2.5", 1),
    ("−3", "-3", 1),
    (r"\boxed{1.5 \times 10^{3}}", "1500", 1),
    (r"\boxed{x = 7}", "7", 1),
    (r"\boxed{2 \text{ million}}", "2", 0),
    ("two million, or 2 million", "2000000", 1),
    (r"\boxed{2\pi}", "2", 0),
    (r"\boxed{5x}", "5", 0),
    (r"\boxed{7!}", "7", 0),
    (r"\boxed{٣}", "3", 0),
    ("the area is 16 cm^2", "16", 1),
    ("no answer", "5", 0),
    ("", "5", 0),
    # what is no number at all
    (r"\boxed{\text{NaN}}", "5", 0),
    (r"\boxed{\infty}", "5", 0),
    (r"\boxed{\text{NaN}}", r"\infty", 0),
    # sets, tuples, intervals, expressions
    (r"\boxed{\{3, 2, 1\}}", r"\{1,2,3\}", 1),
    (r"\boxed{\{1, 2\}}", r"\{1,2,3\}", 0),
    (r"\boxed{(2, 1)}", "(1, 2)", 0),
    (r"\boxed{[0, 1)}", "[0,1)", 1),
    (r"\boxed{[0, 1]}", "[0,1)", 0),
    (r"\boxed{x \le 2}", r"(-\infty, 2]", 1),
    (r"so $(3,5)\cup(-\infty,2]$.", r"(-\infty,2] \cup (3,5)", 1),
    (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", 1),
    (r"\boxed{x^2 + 2x - 1}", "(x+1)^2", 0),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", 1),
    (r"the answer is \(\frac{\pi}{2}\).", r"\pi/2", 1),
    (r"costs $5 and $7", "7", 1),
    # code
    (r"\boxed{__import__('os').getpid()}", "1", 0),
    (r"\boxed{exec('x=5')}", "5", 0),
    (r"\boxed{\operatorname{exit}(5)}", "5", 0),
    ("#### eval('2+3')", "5", 0),
]


def test_adversarial_answers_score_as_they_should(grader):
    assert len(ADVERSARIAL) >= 60
    rewards, _ = score(grader, [(text, gold) for text, gold, _ in ADVERSARIAL])
    wrong = [
        (text[:60], gold[:60], expected, got)
        for (text, gold, expected), got in zip(ADVERSARIAL, rewards, strict=True)
        if got != expected
    ]
    assert not wrong, wrong


def spellings(number, rng):
    """An integer as models write it; all of these are the same answer."""
    form = rng.choice(
        ["{}", "{}.0", "${}", r"\${}", "{} dollars", r"{}\text{{ km}}", "{}%", "x = {}", "**{}**"]
    )
    digits = f"{number:,}" if rng.random() < 0.3 else str(number)
    return form.format(digits.replace("-", rng.choice("-−")))


def final(answer, rng):
    """Where models put it."""
    box = rng.choice([r"\boxed{%s}", "#### %s", r"so $\boxed{%s}$.", r"\boxed{1} \boxed{%s}", "%s"])
    return box % answer if box != "%s" else f"The answer is {answer.removeprefix('x = ')}."


def mutated_solutions(shared_data, rng, count):
    """Real solutions with characters lost, then a right or wrong answer: (text, gold, 0/1)."""
    with gzip.open(shared_data / "gsm8k" / "test.jsonl.gz", "rt") as file:
        records = [json.loads(line)["answer"] for line in file]
    for record in rng.sample(records, count):
        work, gold = record.split("#### ")
        gold = gold.strip()
        for _ in range(rng.randrange(10)):
            i = rng.randrange(len(work))
            work = work[:i] + rng.choice(["", "{", "}", "$", "\\", "^", "−"]) + work[i + 1 :]
        right = rng.random() < 0.5
        value = int(gold.replace(",", "")) + (0 if right else rng.choice([-10, -1, 1, 100]))
        ending = "\n" + final(spellings(value, rng), rng)
        text = f"<think>{work}</think>{ending}" if rng.random() < 0.5 else work + ending
        yield text, gold, float(right)


def formulas(rng, count):
    """Polynomials with their terms in another order, and half of them with one more."""
    for _ in range(count):
        terms = [f"{rng.randrange(2, 10)}{v}^{rng.randrange(2, 5)}" for v in "xyz"]
        gold = " + ".join(terms)
        right = rng.random() < 0.5
        rng.shuffle(terms)
        answer = " + ".join(terms + ["1"] * (not right))
        yield rng.choice([r"\boxed{%s}", "so $%s$", r"it is \(%s\)."]) % answer, gold, float(right)


TERMS = r"""x|y|e|i|0|1|7|99|\pi|\infty|NaN|({})|-{}|{}!|{}+{}|{}-{}|{}{}|{},{}|{}={}|{}<{}|\{{{}\}}
|[{},{})|\frac{{{}}}{{{}}}|\sqrt{{{}}}|{}^{{{}}}|{}^{{{}^{{{}}}}}|\sum_{{n=1}}^{{{}}}n|\ln({})
|\text{{{}}}|\boxed{{{}}}|\sin({})|\int_0^1 {} dx|\lim_{{x\to 0}}{}|{}\cup{}|\operatorname{{f}}({})
|\binom{{{}}}{{{}}}|{}\%|{}\le{}|\begin{{pmatrix}}{}\\{}\end{{pmatrix}}|{}\mod{}""".split("|")


def well_formed(rng, depth):
    """A formula of the grammar above; sense it makes none."""
    form = rng.choice(TERMS if depth else TERMS[:9]).strip()
    parts = [well_formed(rng, depth - 1) for _ in range(form.count("{}"))]
    return form.format(*parts)


SCRAPS = r"\frac \boxed{ \left( \{ \end{pmatrix} & \\ \text{ { } ( ] + ^ _ = . ; $ $$ '".split()
SCRAPS += ["9", "x", " ", "−", "\x00", "\ud800", "٣", "NaN"]


def nonsense(rng, count):
    """LaTeX with and without balance; the gold answer is a number that none of it makes."""
    for i in range(count):
        if i % 2:
            text = "".join(rng.choice(SCRAPS) for _ in range(rng.randrange(1, 25)))
        else:
            text = well_formed(rng, depth=3)
        yield rng.choice([r"\boxed{%s}", "$%s$", "%s", "#### %s"]) % text, "31415.9265", 0.0


def test_fuzzed_answers_neither_hang_nor_crash_nor_score_wrongly(grader, shared_data):
    rng = random.Random(0)
    rows = [*mutated_solutions(shared_data, rng, 400), *formulas(rng, 200), *nonsense(rng, 400)]
    rewards, breakdown = score(grader, [row[:2] for row in rows])
    wrong = [row for row, reward in zip(rows, rewards, strict=True) if reward != row[2]]
    assert not wrong, wrong[:5]
    assert 250 < sum(rewards) < 350  # about half of the first 600 are right
    assert sum(breakdown["timeouts"]) < 50


def test_a_hanging_and_a_dying_worker_cost_their_own_item_only(grader, monkeypatch):
    """Python code sees its own limit; C code, here a stopped process, is killed by us."""
    score(grader, [(r"\boxed{x}", "y")] * 2)
    for end in (signal.SIGKILL, signal.SIGSTOP):
        victims = [worker._process.pid for worker in grader.pool._workers if worker._process]
        for victim in victims:
            os.kill(victim, end)
        rows = [(rf"\boxed{{x + {i}}}", f"{i} + x") for i in range(5)]
        started = time.monotonic()
        rewards, breakdown = score(grader, rows)
        assert time.monotonic() - started < 20
        assert sum(breakdown["timeouts"]) == len(victims)
        assert [r + t for r, t in zip(rewards, breakdown["timeouts"], strict=True)] == [1.0] * 5


def test_model_text_is_never_run(grader, tmp_path):
    """In every place an answer is read from, and in the gold answer too."""
    code = INJECTION.format(path=tmp_path / "pwned")
    forms = [r"\boxed{%s}", "$%s$", "#### %s", r"\boxed{\operatorname{%s}}", r"\boxed{\text{%s}}"]
    rewards, _ = score(grader, [(form % code, "5") for form in forms])
    assert rewards == [0.0] * 5
    score(grader, [("5", form % code) for form in forms])
    grader.complaints([code, *(form % code for form in forms)])
    assert not list(tmp_path.iterdir())


WORKER = """
import sys
from jaxreason.rewards import latex_worker
latex_worker.guard_sympy()
import sympy
assert latex_worker.compare("(x+1)^2", "x^2+2x+1")
assert sympy.sympify("12") == 12
try:
    sympy.sympify({code!r})
except Exception as error:
    assert "will not be evaluated" in str(error), error
else:
    raise AssertionError("code was evaluated")
assert not {{"jax", "jaxlib", "numpy"}} & set(sys.modules)
"""


def test_worker_has_no_jax_and_evaluates_no_text(tmp_path):
    """The guard below math-verify holds even where its extraction would let text through."""
    code = INJECTION.format(path=tmp_path / "pwned")
    subprocess.run([sys.executable, "-c", WORKER.format(code=code)], check=True, timeout=60)
    assert not list(tmp_path.iterdir())


def test_unreadable_gold_formulas_are_named(grader):
    golds = ["5", r"\frac{1}{2}", r"$\{1, 2\}$", "[0,1)", r"\frac{1}{", r"\left(", ""]
    complaints = grader.complaints(golds)
    assert complaints[:4] == [None] * 4
    assert all("must be a number or LaTeX" in complaint for complaint in complaints[4:])


def test_a_worker_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        latex.Pool(1, 1.0).run([{"gold": "x"}])


@pytest.mark.parametrize("options", [{"workers": 0}, {"timeout_seconds": 0.0}])
def test_impossible_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        latex.MathVerify(split_reasoning, **options)
