"""Terms are summed with their weights, in order, and mistakes are named in one line."""

import dataclasses
import json
import math
import re
import time

import numpy as np
import pytest

from jaxreason import types
from jaxreason.rewards import mix
from jaxreason.rewards.mix import RewardConfig
from jaxreason.text.chat import split_reasoning

GSM8K = {"exact": RewardConfig("math"), "format": RewardConfig("format", 0.1)}


def completions(*texts):
    return [types.Completion(t, ids=(1, 2), logprobs=(), truncated=False) for t in texts]


def prompts(*answers):
    return [types.Prompt(f"gsm8k/{i}", "?", a, "gsm8k") for i, a in enumerate(answers)]


def user_reward(completions, answers):
    return [float(c.num_tokens) for c in completions], {"same": [1.0] * len(answers)}


# What a user's function may return by mistake for two completions, and how it is named.
MISTAKES = {
    "bare": ([1.0, 0.5], r"returned [1.0, 0.5]; it must be a pair (values, details)"),
    "three": ((1.0, 0.5, 0.0), "returned (1.0, 0.5, 0.0); it must be a pair (values, details)"),
    "nothing": (None, "returned None; it must be a pair"),
    "table": (np.eye(2), "returned array([[1., 0... [0., 1.]]); it must be a pair"),
    "no_dict": (([1.0, 0.5], [1.0, 0.5]), "returned ([1.0, 0.5], [1.0, 0.5]); it must be a pair"),
    "number": ((1.0, {}), "returned values = 1.0; it must hold one finite number for each of 2"),
    "short": (([1.0], {}), "returned values of length 1; it must hold one finite number for each"),
    "nan": (([1.0, math.nan], {}), "returned values[1] = nan; it must hold one finite number"),
    "text": ((["1", 1.0], {}), "returned values[0] = '1'; it must hold one finite number"),
    "detail": (([1.0, 0.5], {"d": 1.0}), "returned details['d'] = 1.0; it must hold one finite"),
    "long": (([1.0, 0.5], {"d": [1.0] * 3}), "returned details['d'] of length 3; it must hold"),
    "inf": (([1.0, 0.5], {"d": [1.0, math.inf]}), "returned details['d'][1] = inf; it must hold"),
}


def returning(value):
    return lambda completions, answers: value


globals().update({f"mistaken_{name}": returning(value) for name, (value, _) in MISTAKES.items()})


def arrays(completions, answers):
    values = np.arange(len(answers), dtype=np.float32)
    return values, {"first": values == 0}


def test_gsm8k_recipe():
    """0.1 format + 1.0 exact."""
    rows = completions("<think>a</think>#### 5", "#### 5", "<think>a</think>#### 6", "<think>5")
    with mix.build(GSM8K, split_reasoning) as reward:
        values, breakdown = reward(rows, ["5"] * 4)
    assert values == pytest.approx([1.1, 1.05, 0.1, 0.0])
    assert breakdown["exact"] == [1.0, 1.0, 0.0, 0.0]
    assert breakdown["format"] == [1.0, 0.5, 1.0, 0.0]
    assert breakdown["exact/answered"] == [1.0, 1.0, 1.0, 0.0]


def test_kinds_options_and_negative_weights():
    configs = {
        "task": RewardConfig("arithmetic", 2.0),
        "long": RewardConfig("length", -1.0, {"max_tokens": 4, "shape": "linear"}),
        "mine": RewardConfig(f"{__name__}:user_reward", 0.5),
    }
    values, breakdown = mix.build(configs, split_reasoning)(completions("5"), ["5"])
    assert values == [2.0 - 0.5 + 1.0]
    assert breakdown["mine"] == [2.0] and breakdown["mine/same"] == [1.0]


def test_no_completions():
    assert mix.build(GSM8K, split_reasoning)([], [])[0] == []


@pytest.mark.parametrize(
    "config, message",
    [
        (RewardConfig("maths"), "rewards.x: kind is 'maths'; it must be .*math, arithmetic"),
        (RewardConfig("math", math.nan), "rewards.x.weight is nan"),
        (RewardConfig("math", "1"), "rewards.x.weight is '1'; it must be finite"),
        (RewardConfig("math", 1.0, {"slack": 1}), "math has no option 'slack'; it has none"),
        (RewardConfig("length"), "length needs the option 'max_tokens'"),
        (RewardConfig("length", 1.0, {"max_tokens": 0}), "max_tokens is 0"),
        (RewardConfig("math_verify", 1.0, {"workers": 0}), "workers is 0"),
        (RewardConfig("no_such_module:f"), "No module named 'no_such_module'"),
        (RewardConfig(f"{__name__}:nothing"), "has no function 'nothing'"),
        (RewardConfig(f"{__name__}:GSM8K"), "has no function 'GSM8K'"),
        (RewardConfig(f"{__name__}:user_reward", 1.0, {"a": 1}), "takes no options"),
    ],
)
def test_mistakes_are_named_in_one_line(config, message):
    with pytest.raises(ValueError, match=message) as error:
        mix.build({"x": config}, split_reasoning)
    assert "\n" not in str(error.value) and str(error.value).startswith("rewards.x")


def test_an_empty_mix_is_refused():
    with pytest.raises(ValueError, match="at least one term"):
        mix.build({}, split_reasoning)


@pytest.mark.parametrize("name", MISTAKES)
def test_what_a_users_function_returns_is_checked(name):
    reward = mix.build({"x": RewardConfig(f"{__name__}:mistaken_{name}")}, split_reasoning)
    with pytest.raises(ValueError, match=f"^rewards.x {re.escape(MISTAKES[name][1])}") as error:
        reward(completions("a", "b"), ["", ""])
    assert "\n" not in str(error.value)


def test_a_users_function_may_return_arrays():
    """They become plain floats, which a checkpoint of the rollout can write as JSON."""
    reward = mix.build({"x": RewardConfig(f"{__name__}:arrays", 0.5)}, split_reasoning)
    values, breakdown = reward(completions("a", "b"), ["", ""])
    assert json.loads(json.dumps([values, breakdown])) == [
        [0.0, 0.5],
        {"x": [0.0, 1.0], "x/first": [1.0, 0.0]},
    ]


@pytest.mark.parametrize("kind", mix.KINDS)
def test_an_option_of_another_type_is_named_when_the_mix_is_built(kind):
    wrong = {int: ("many", True, 0.5), float: ("2", True, math.nan), str: (3,), bool: ("no", 1)}
    for field in dataclasses.fields(mix.KINDS[kind]):
        if field.name in ("split", "tags"):
            continue
        for value in wrong[field.type]:
            named = f"^rewards.x.options.{field.name} is {value!r}; it must be "
            with pytest.raises(ValueError, match=named) as error:
                mix.build({"x": RewardConfig(kind, 1.0, {field.name: value})}, split_reasoning)
            assert "\n" not in str(error.value)


def test_a_whole_number_will_do_where_a_fraction_may_be():
    options = {"max_tokens": 4, "shape": "linear", "shortest": 2, "longest": 0}
    reward = mix.build({"x": RewardConfig("length", 1.0, options)}, split_reasoning)
    assert reward(completions("a"), [""])[0] == [1.0]


def test_loops_of_a_model_are_graded_in_linear_time():
    """Every kind, on the loops that would make a careless regular expression quadratic."""
    golds = {"countdown": '{"target": 3, "numbers": [1, 2]}', "choice": "A"}
    options = {"length": {"max_tokens": 4}}
    loops = (
        r"\( \[ \boxed{ $ $$ <answer> </answer> <think> #### 1, 1/ ( { - ** \frac1 = 1.5e".split()
    )
    rows = completions(*(loop * 20_000 for loop in [*loops, "1 ", "answer ", "x = ", "A or "]))
    for kind in set(mix.KINDS) - {"arithmetic"}:  # the same as math
        config = RewardConfig(kind, 1.0, options.get(kind, {}))
        started = time.monotonic()
        with mix.build({"x": config}, split_reasoning) as reward:
            reward(rows, [golds.get(kind, "2")] * len(rows))
        assert time.monotonic() - started < 5, kind  # under 1 s; quadratic ones take much longer


def test_completions_need_an_answer_each():
    with pytest.raises(ValueError, match="2 completions have 1 answers"):
        mix.build(GSM8K, split_reasoning)(completions("a", "b"), ["1"])


@pytest.mark.parametrize(
    "kind, answers, bad",
    [
        ("math", ["5", "1/2", "five"], 2),
        ("choice", ["A", "Z"], 1),
        ("countdown", ['{"target": 3, "numbers": [1, 2]}', "3"], 1),
    ],
)
def test_fault_14_an_unparsable_gold_answer_is_refused_when_data_is_loaded(kind, answers, bad):
    """open-r1 gives 1.0 for it; here the item is named before training, and is worth 0."""
    reward = mix.build({"x": RewardConfig(kind), "f": RewardConfig("format")}, split_reasoning)
    reward.check(prompts(*answers[:bad]))
    with pytest.raises(ValueError, match=rf"^gsm8k/{bad}: rewards.x: gold answer is .*must be"):
        reward.check(prompts(*answers))
