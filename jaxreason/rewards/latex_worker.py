"""One worker process that compares LaTeX answers with math-verify; started by rewards/latex.py.

Run as `python -m jaxreason.rewards.latex_worker SECONDS`: a line of JSON in, a line of JSON out.
Nothing here may import jax: a second process must not take the accelerator.

Only math-verify's LaTeX extraction is used; its expression extraction gives text to sympy's
parse_expr, which evaluates it. Sympy itself makes numbers that way, out of what its grammar calls
a number, so in this process parse_expr takes numerals and refuses all else.
"""

import json
import logging
import os
import re
import resource
import signal
import sys

_MAX_MEMORY = 2 << 30  # bytes: 10^10^10 in full would take 4 GB
_NUMERAL = re.compile(r"[+-]?[0-9.]+(?:[eE][+-]?[0-9]{1,4})?")


class OutOfTime(BaseException):
    """CPU time is used up. No Exception: sympy swallows those of its own code."""


def guard_sympy() -> None:
    """Lets numerals alone through to sympy's evaluation of text, before math-verify binds it."""
    import sympy.parsing
    from sympy.parsing import sympy_parser

    parse = sympy_parser.parse_expr

    def parse_numeral(text, *args, **kwargs):
        if not _NUMERAL.fullmatch(text):
            raise ValueError(f"{text[:50]!r} is no numeral: it will not be evaluated")
        return parse(text, *args, **kwargs)

    sympy_parser.parse_expr = sympy.parsing.parse_expr = parse_numeral


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
    return bool(golds) and verify(golds, parse(answer), timeout_seconds=None)


def respond(request: dict[str, str]) -> dict[str, bool]:
    """{"gold"} -> whether it can be read; {"gold", "answer"} -> whether they are equivalent."""
    if "answer" in request:
        return {"value": compare(request["gold"], request["answer"])}
    return {"value": bool(parse(request["gold"]))}


def main() -> None:
    seconds = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever prints does not end up between the replies
    logging.disable()
    guard_sympy()
    compare("x", "2 x / 2")  # all that is imported and built at first use

    def out_of_time(signum, frame):
        raise OutOfTime

    signal.signal(signal.SIGPROF, out_of_time)
    print(json.dumps({"ready": True}), file=replies)
    for line in sys.stdin:
        try:
            # CPU seconds, so that a reward does not depend on how busy the machine is.
            signal.setitimer(signal.ITIMER_PROF, seconds)
            reply = respond(json.loads(line))
            signal.setitimer(signal.ITIMER_PROF, 0)
        except OutOfTime:
            reply = {"timeout": True}
        except Exception as error:  # whatever sympy raises on a formula: it is not equivalent
            signal.setitimer(signal.ITIMER_PROF, 0)
            reply = {"value": False, "error": type(error).__name__}
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    main()
