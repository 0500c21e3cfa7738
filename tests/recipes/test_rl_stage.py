"""What a stage of reinforcement learning refuses before anything is trained."""

import pathlib

import pytest

from jaxreason import launch
from jaxreason.objectives.policy import PRESETS
from jaxreason.recipes import defaults, rl
from jaxreason.recipes.workdir import Workdir
from jaxreason.text.tokenizer import ByteTokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]


def plan(monkeypatch, **changes) -> rl.RLStage:
    monkeypatch.chdir(ROOT)
    config = launch.load_config("rl:smoke")
    for key, text in {"train.rows_multiple": "8", **changes}.items():
        launch.override(config, key, text)
    return rl.plan(config, "rl", config)


MISTAKES = {
    "train.advantage.estimator=external": r"estimator is external, which leaves .* to a teacher",
    "train.algorithm=opd": r"train\.teacher\.from is empty, and train\.algorithm = opd learns from",
    "train.algorithm=gkd": r"train\.teacher\.from is empty, and train\.algorithm = gkd learns from",
    "train.distill.kd_coef=0.5": r"algorithm = dapo with train\.distill learns from a teacher",
    "train.distill.divergence=kl": r"train\.distill\.divergence is 'kl'; it must be one of",
    "rollout.lmbda=0.5": r"rollout\.lmbda is 0\.5; only a teacher's divergence",
    "train.advantage.estimator=none": r"estimator is none, which leaves nothing but a teacher's",
    "train.teacher.coef=0.5": r"train\.teacher\.coef is 0\.5, but train\.teacher\.from is empty",
    "train.teacher.from=random": r"train\.teacher\.from is 'random'; a teacher is",
    "train.teacher.from=/no/where": r"train\.teacher\.from is '/no/where'; .* no config\.json",
    "rollout.num_generations=1": r"rollout\.num_generations is 1; .* at least 2",
    "rollout.slots=0": r"rollout\.slots is 0; it must be at least 1",
    "rollout.mesh.tensor=3": r"rollout\.mesh: .*tensor",
    "train.rows_multiple=0": r"train\.rows_multiple is 0; at least 1",
    "train.entropy_coef=-0.1": r"train\.entropy_coef is -0\.1; it must be 0 or more",
    "eval.every=-1": r"eval\.every is -1; it must be 0 or more",
    "rollout.temperature=0": r"rollout\.temperature is 0",
    "rollout.solved_by=format": r"rollout\.solved_by is 'format'; it must be one of .*accuracy",
    "train.updates=3": r"rollout\.num_prompts is 4; it must be a multiple of train\.updates = 3",
}


@pytest.mark.parametrize("flag", MISTAKES)
def test_what_cannot_run_is_named(monkeypatch, flag):
    key, _, value = flag.partition("=")
    with pytest.raises(ValueError, match=MISTAKES[flag]) as error:
        plan(monkeypatch, **{key: value})
    assert "\n" not in str(error.value)


def test_a_teacher_alone_needs_no_groups_and_no_rewards_that_differ(monkeypatch):
    opd = {"train.algorithm": "opd", "train.teacher.from": "@big", "rollout.num_generations": "1"}
    with pytest.raises(ValueError, match=r"filter_zero_std is true and .*estimator external"):
        plan(monkeypatch, **opd, **{"rollout.filter_zero_std": "true"})
    stage = plan(monkeypatch, **opd, **{"rollout.filter_zero_std": "false"})
    assert (stage.teacher.stage, stage.algorithm.teacher.coef) == ("big", 1.0)
    mixed = plan(monkeypatch, **{"train.teacher.from": "@big", "train.teacher.coef": "0.1"})
    assert mixed.algorithm.advantage.estimator != "external"
    assert mixed.algorithm.teacher.coef == 0.1


GKD = {
    "train.algorithm": "gkd",
    "train.teacher.from": "@big",
    "rollout.filter_zero_std": "false",
    "rollout.num_generations": "1",
}
ANSWERS = {"data.sources.arithmetic.rendering": "long_cot"}


def test_a_divergence_is_learnt_alone_or_beside_rewards(monkeypatch):
    stage = plan(monkeypatch, **GKD, **ANSWERS, **{"rollout.temperature": "0.9"})
    distill = stage.algorithm.distill
    assert (distill.divergence, distill.mix.beta, distill.temperature) == ("jsd", 0.5, 0.9)
    assert stage.algorithm.teacher is None and not stage.algorithm.has_policy
    assert stage.algorithm.lmbda == stage.collect.lmbda == 0.5
    rewarded = plan(monkeypatch, **{"train.teacher.from": "@big", "train.distill.kd_coef": "0.3"})
    assert rewarded.algorithm.has_policy and rewarded.algorithm.teacher is None
    assert rewarded.algorithm.distill.kd_coef == 0.3 and rewarded.algorithm.lmbda == 1
    both = {"train.distill.kd_coef": "0.3", "train.teacher.coef": "0.1"}
    assert plan(monkeypatch, **{"train.teacher.from": "@big"}, **both).algorithm.teacher.coef == 0.1
    single = {**GKD, "train.algorithm": "minillm"}
    minillm = plan(monkeypatch, **single).algorithm
    assert minillm.distill.divergence == "reverse_kl" and minillm.lmbda == 1
    assert (minillm.teacher.gamma, minillm.teacher.future) == (0.95, True)


def test_steps_that_do_not_sample_want_answers(monkeypatch):
    with pytest.raises(
        ValueError, match=r"lmbda is 0\.5 and data\.sources\.arithmetic\.rendering is"
    ):
        plan(monkeypatch, **GKD)
    plan(monkeypatch, **GKD, **{"rollout.lmbda": "1.0"})
    with pytest.raises(ValueError, match=r"train\.entropy_coef is 0\.1 .*; a bonus needs"):
        plan(monkeypatch, **GKD, **ANSWERS, **{"train.entropy_coef": "0.1"})
    with pytest.raises(ValueError, match=r"filter_zero_std is true and .*estimator none"):
        plan(monkeypatch, **{**GKD, "rollout.filter_zero_std": "true"}, **ANSWERS)
    with pytest.raises(ValueError, match=r"policy\.epsilon is 0\.1, .* no policy gradient to read"):
        plan(monkeypatch, **GKD, **ANSWERS, **{"train.policy.epsilon": "0.1"})


def test_an_answer_too_long_for_a_row_is_found_in_the_data(monkeypatch, tmp_path):
    lines = ['{"q": "1+1", "a": "2", "r": "2"}', '{"q": "1+2", "a": "3", "r": "%s"}' % ("3" * 200)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(ROOT)
    config = launch.load_config("rl:smoke")
    for key, value in {**GKD, "train.rows_multiple": "8"}.items():
        launch.override(config, key, value)
    files = dict(path=str(tmp_path / "p.jsonl"), prompt_field="q", answer_field="a")
    config.data.sources = {"m": defaults.prompts(name="m", **files, response_field="r")}
    stage = rl.plan(config, "rl", config)
    with pytest.raises(
        ValueError, match=r"data\.sources\.m: m/1 has 204 tokens with its own answer"
    ):
        rl.check_data(config, stage, ByteTokenizer(), Workdir(tmp_path))


def test_one_completion_a_prompt_is_for_estimators_without_groups(monkeypatch):
    alone = {"rollout.num_generations": "1", "rollout.filter_zero_std": "false"}
    for algorithm in ("reinforce_pp", "ppo"):
        plan(monkeypatch, **alone, **{"train.algorithm": algorithm})
    with pytest.raises(ValueError, match="at least 2"):
        plan(monkeypatch, **alone, **{"train.algorithm": "grpo"})


def test_a_switch_that_is_set_leaves_no_number_of_the_presets_own_choice(monkeypatch):
    algorithm = lambda name, **switches: (
        plan(
            monkeypatch,
            **{"train.algorithm": name},
            **{f"train.policy.{key}": value for key, value in switches.items()},
        ).algorithm
    )
    assert algorithm("cispo").policy.cap is not None
    assert algorithm("cispo", clip="ppo").policy.cap is None
    assert algorithm("cispo", clip="dual", delta="4.0").policy.delta == 4
    grpo = algorithm("grpo", kl="none")
    assert grpo.policy.beta == 0 and not grpo.needs_reference
    assert algorithm("grpo", kl="k2").policy.beta == PRESETS["grpo"].policy.beta


def test_a_prompt_that_leaves_no_room_for_its_completion_is_found_in_the_data(
    monkeypatch, tmp_path
):
    (tmp_path / "p.jsonl").write_text(
        '{"q": "1+1", "a": "2"}\n{"q": "%s", "a": "3"}\n' % ("1+1+1" * 30)
    )
    monkeypatch.chdir(ROOT)
    config = launch.load_config("rl:smoke")
    config.data.sources = {
        "mine": defaults.prompts(
            name="mine", path=str(tmp_path / "p.jsonl"), prompt_field="q", answer_field="a"
        )
    }
    stage = rl.plan(config, "rl", config)
    with pytest.raises(ValueError, match=r"data\.sources\.mine: mine/1 has 150 tokens; .* leaves"):
        rl.check_data(config, stage, ByteTokenizer(), Workdir(tmp_path))
