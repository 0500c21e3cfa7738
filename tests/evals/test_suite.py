"""Sets of one evaluation do not disturb one another."""

import jax
import pytest

from jaxreason import types
from jaxreason.evals import accuracy, suite


def make(name, count=3):
    problems = tuple(accuracy.Problem(f"{name}{i}", "1") for i in range(count))
    return suite.EvalSet(name, problems, types.Sampling(max_tokens=4, num_samples=4), grade)


def generate(params, prompts, sampling, key):
    draws = jax.random.bernoulli(key, shape=(len(prompts), sampling.num_samples)).tolist()
    return [[types.Completion(str(int(d)), (1,), (0.0,), False) for d in row] for row in draws]


def grade(text, answer):
    return text, text == answer


def run(*sets):
    return suite.run(sets, generate, {}, jax.random.key(3))


def test_a_set_draws_the_same_whatever_stands_beside_it():
    alone, alone_samples = run(make("x", 40))
    both, samples = run(make("y", 40), make("x", 40))
    assert both["x"] == alone["x"] and both["x"] != both["y"]
    assert samples[40:] == alone_samples
    assert {sample["set"] for sample in samples[:40]} == {"y"}


def test_names_differ():
    with pytest.raises(ValueError, match="two evaluation sets are named 'x'"):
        run(make("x"), make("x"))
