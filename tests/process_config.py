"""A config for runs in processes of their own: a two-layer model of sums, seconds on two cores.

`fit` and `rl` begin with random parameters. `sums` learns some by heart, `rl_sums` goes on from
there (--config.init.from=WORKDIR@tiny).
"""

from jaxreason.recipes import defaults

MODEL = dict(
    vocab_size=264, num_layers=2, embed_dim=32, mlp_dim=64, num_heads=4, num_kv_heads=2, head_dim=8
)


def get_config(arg: str):
    c = defaults.default_config("tiny", "rl" if arg.startswith("rl") else "fit")
    c.chat.template = "plain"
    c.model = defaults.model_config("qwen3-tiny", **MODEL)
    c.arithmetic = defaults.arithmetic_config(
        min_operations=1, max_operations=2, max_operand=12, cap=200, num_train=400, num_test=8
    )
    c.run.export = arg == "rl"
    c.log.every = 1
    c.run.processes.heartbeat = 10
    (_reinforcement if arg.startswith("rl") else _training)(c)
    if arg.endswith("sums"):
        _known_sums(c, arg)
    return c


def _training(c) -> None:
    c.update(defaults.stage_config())
    c.data.sources = {
        "a": defaults.source(name="a", kind="arithmetic", rendering="text", split="train")
    }
    c.data.update(rows=8, length=64, num_shards=4)
    c.train.steps = 20
    c.train.optimizer.update(learning_rate=1e-2, schedule="constant")
    c.run.save_every = 10


def _reinforcement(c) -> None:
    c.update(defaults.rl_config())
    c.data.sources = {
        "a": defaults.prompts(
            name="a", kind="arithmetic", path="arithmetic", split="train",
            prompt_template="{expression}=",
        )
    }  # fmt: skip
    # Random parameters solve nothing; they differ in how much they repeat themselves.
    c.rewards = {
        "accuracy": defaults.reward("math"),
        "varied": defaults.reward("repetition", ngram=1),
    }
    c.rollout.update(num_prompts=5, num_generations=4, max_tokens=16, slots=16)
    c.rollout.filter_zero_std = False
    c.train.update(steps=2, updates=1, length=48, rows_multiple=4)
    c.train.mask_truncated_completions = False
    c.train.optimizer.learning_rate = 1e-3
    c.run.save_every = 2
    c.eval.rows = 16
    c.eval.sets = {
        "sums": defaults.arithmetic_eval(
            prompt_template="{expression}=", max_tokens=8, limit=3, num_samples=2
        )
    }


def _known_sums(c, arg: str) -> None:
    c.arithmetic.update(max_operations=1, max_operand=9, num_train=120, num_test=24)
    if arg == "sums":
        c.data.sources["a"].update(rendering="answer", prompt_template="{expression}=")
        c.train.steps = 120
        c.run.save_every = 1000
        return
    c.model = defaults.model_config()  # the checkpoint's
    c.eval.sets = {
        "known": defaults.prompts_eval(
            c.data.sources["a"].to_dict(), defaults.reward("math"), max_tokens=8, limit=100,
            num_samples=1, temperature=0.0, top_p=1.0,
        )
    }  # fmt: skip
    c.eval.every = 1
