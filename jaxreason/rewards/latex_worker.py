"""One worker process that compares LaTeX answers with math-verify; started by rewards/latex.py.

Run as `python -m jaxreason.rewards.latex_worker SECONDS`: a line of JSON in, a line of JSON out.
Nothing here may import jax: a second process must not take the accelerator.

Only math-verify's LaTeX extraction is used; its expression extraction gives text to sympy's
parse_expr, which evaluates it. Sympy also makes numbers that way, of what the LaTeX grammar calls
a number, so in this process parse_expr takes only a numeral or a name: neither runs anything.
"""

import itertools
import json
import logging
import os
import re
import resource
import signal
import sys

_MAX_MEMORY = 2 << 30  # bytes: 10^10^10 in full would take 4 GB
_HARMLESS = re.compile(r"[+-]?[0-9.]+(?:[eE][+-]?[0-9]{1,4})?|[A-Za-z][A-Za-z0-9_]*")


class OutOfTime(BaseException):
    """CPU time is used up. No Exception: sympy swallows those of its own code."""


def guard_sympy() -> None:
    """Keeps all but numerals and names from sympy's evaluation; before math_verify is imported."""
    import sympy.parsing
    from sympy.parsing import sympy_parser

    parse = sympy_parser.parse_expr

    def parse_harmless(text, *args, **kwargs):
        if not _HARMLESS.fullmatch(text):
            raise ValueError(f"{text[:50]!r} is no numeral and no name: it will not be evaluated")
        return parse(text, *args, **kwargs)

    sympy_parser.parse_expr = sympy.parsing.parse_expr = parse_harmless


def parse(latex: str) -> list:
    """The sympy objects, none or one, that math-verify reads from a formula without its dollars."""
    from math_verify import LatexExtractionConfig
    from math_verify.parser import parse as parse_latex

    config = LatexExtractionConfig(boxed_match_priority=0)
    return parse_latex(
        f"\\boxed{{{latex}}}",
        extraction_config=[config],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )


def compare(gold: str, answer: str) -> bool:
    """Whether two formulas are equivalent."""
    from math_verify import verify

    golds = parse(gold)
    answers = parse(answer)
    return bool(golds) and verify(
        golds, answers, allow_set_relation_comp=True, timeout_seconds=None
    )


def respond(request: dict[str, str], seconds: float) -> dict[str, bool]:
    """{"gold"} -> whether it can be read; {"gold", "answer"} -> whether they are equivalent."""
    try:
        # CPU seconds, so that a reward does not depend on how busy the machine is.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        value = compare(**request) if "answer" in request else bool(parse(request["gold"]))
        signal.setitimer(signal.ITIMER_PROF, 0)
    except OutOfTime:
        return {"value": False, "timeout": True}
    except Exception:  # whatever sympy raises on a formula: it is not equivalent
        signal.setitimer(signal.ITIMER_PROF, 0)
        return {"value": False}
    return {"value": value}


def main() -> None:
    seconds = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever prints does not end up between the replies
    logging.disable()
    guard_sympy()
    compare("(x + 1)^2", "x^2 + 2x + 1")  # all that is imported and built at first use

    def out_of_time(signum, frame):
        raise OutOfTime

    signal.signal(signal.SIGPROF, out_of_time)
    for line in itertools.chain(['{"gold": "ready"}'], sys.stdin):
        print(json.dumps(respond(json.loads(line), seconds)), file=replies)


if __name__ == "__main__":
    main()
