"""Reinforcement learning on a mesh: what is sampled, rewarded and learnt is that of one device."""

import json

import numpy as np
import pytest
from launched import metrics, run

FSDP_TENSOR = tuple(f"--config.mesh.shape.{axis}={n}" for axis, n in
                    (("data", 1), ("fsdp", 4), ("tensor", 2)))  # fmt: skip


@pytest.mark.slow
def test_a_trained_model_earns_the_same_rewards_on_a_mesh(tmp_path):
    """Completions, drawn and greedy, to the character, from a model that knows some sums.

    It learns between them: after each of two updates the greedy answers are graded again.
    """
    taught = run(tmp_path / "taught", 1, recipe="sums", devices=1)
    start = f"--config.init.from={taught}@tiny"
    alone = run(tmp_path / "alone", 1, start, recipe="rl_sums", devices=1)
    split = run(tmp_path / "split", 1, start, *FSDP_TENSOR, recipe="rl_sums", devices=8)

    said = json.loads((split / "config.json").read_text())["mesh"]
    assert (said["fsdp"], said["tensor"]) == (4, 2)
    samples = (alone / "samples.jsonl").read_text()
    assert (split / "samples.jsonl").read_text() == samples and samples.count("\n") > 100
    assert len(metrics(alone)) == 2
    for one, many in zip(metrics(alone), metrics(split), strict=True):
        assert 0.1 < one["eval/known/avg@1"] < 1 and one["grad_norm"] > 0
        for name in ("reward", "eval/known/avg@1", "eval/known/mean_tokens"):
            assert many[name] == one[name]
        for name in ("loss", "grad_norm", "entropy", "rollout/token_mult_prob_error"):
            # As of two processes (tests/test_processes.py): advantages that add to 0.
            np.testing.assert_allclose(many[name], one[name], rtol=1e-4, atol=1e-6, err_msg=name)
