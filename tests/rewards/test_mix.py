"""Terms are summed with their weights, in order, and mistakes are named in one line."""

import math
import time

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


def wrong_count(completions, answers):
    return [1.0], {}


def not_finite(completions, answers):
    return [math.nan] * len(completions), {}


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


@pytest.mark.parametrize(
    "name, message", [("wrong_count", "1 values for 2"), ("not_finite", "nan")]
)
def test_what_a_users_function_returns_is_checked(name, message):
    reward = mix.build({"x": RewardConfig(f"{__name__}:{name}")}, split_reasoning)
    with pytest.raises(ValueError, match=f"^rewards.x returned {message}"):
        reward(completions("a", "b"), ["", ""])


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
