"""A rollout's solve rates come from `rollout.solved_by`, and a reward that has none is named."""

import jax
import pytest

from jaxreason.data.prompts import PromptConfig, PromptSource, PromptStream
from jaxreason.train.collect import CollectConfig, Collector, Rollout
from jaxreason.types import Completion, Prompt, Sampling

QUESTIONS = [Prompt(id=f"s/{i}", text="1+1=", answer="2", source="s") for i in range(2)]


def collector(values):
    """Of two completions a prompt, whose reward `right` is these values."""
    source = PromptSource(name="s", path="unread.jsonl", prompt_field="q", answer_field="a")
    answer = Completion("2", ids=(2,), logprobs=(0.0,), truncated=False)
    return Collector(
        config=CollectConfig(num_prompts=2, filter_zero_std=False),
        sampling=Sampling(max_tokens=1, num_samples=2),
        prompts=PromptStream(PromptConfig(sources={"s": source}), {"s": QUESTIONS}, say=print),
        encode=lambda text: [1],
        generate=lambda params, texts, *_, on_progress: [[answer, answer] for _ in texts],
        reward=lambda found, answers: ([0.0] * len(found), {"right": values * (len(found) // 2)}),
        solved_by="right",
        key=jax.random.key(0),
    )


def test_the_mean_is_the_solve_rate():
    own = collector([1.0, 0.5])
    assert len(own.collect(Rollout(step=0), {}).groups) == 2
    assert [own.prompts.solve_rate(prompt.id) for prompt in QUESTIONS] == [0.75, 0.75]


@pytest.mark.parametrize("values, bad", [([-1.0, -1.0], -1.0), ([1.0, -1.0], -1.0), ([0, 2], 2)])
def test_a_reward_that_is_no_solve_rate_is_named(values, bad):
    """Also where its mean happens to be in [0, 1]: half of +-1 is not a rate of 0."""
    says = rf"^rollout.solved_by is 'right', but rewards.right is {bad} .*s/\d; .*within \[0, 1\]"
    with pytest.raises(ValueError, match=says) as error:
        collector(values).collect(Rollout(step=0), {})
    assert "\n" not in str(error.value)
