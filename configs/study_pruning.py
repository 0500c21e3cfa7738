"""Long chains cut to what their student needs: what is lost in accuracy, what is saved in tokens.

  python -m jaxreason.launch --config=study_pruning          2 CPU cores, 86 minutes, a study beside
  python -m jaxreason.launch --config=study_pruning:smoke    the same in little

After Efficient Long CoT (arXiv 2505.18440), on the arithmetic of study_valley: of the long chains
half end in a review of all steps, three steps of ten are checked, one of ten is first wrong. The
`tiny` model taught by short chains learns 3,072 such chains (`full`), two epochs in batches of 32
(which study_valley found better than larger ones), and is then asked itself, by binary search, how
much of each it needs. From the same start, in as many updates:

  pruned         the chains cut so
  guided         the same search, which asks first after the step that comes to the answer
  first correct  cut after that step, nobody asked (the paper's baseline)
  random         cut anywhere
  dpo            after `guided`, the cut over the full chain, with 0.3 of the SFT loss, at 1e-4
  dpo 2e-5       the same at a fifth of the rate

`guided` and what `dpo` follows were added when the first cells of `pruned` were in (two of three
chains were not monotone for their student, and halving lands in reviews), `dpo 2e-5` when `dpo` had
lost 0.15.

Three seeds, of the expressions and their order, on the same 2,000 held-out expressions. `full`
also asks the student after every step of its first 200 chains. What binary search takes for
granted, that a longer prefix is never worse, is said in its file under stages.exhaustive.
"""

from ml_collections import ConfigDict

from jaxreason.launch import load_config
from jaxreason.recipes import defaults

SEEDS = 3


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"--config=study_pruning:{arg}: the argument is nothing or smoke")
    smoke = arg == "smoke"
    valley = load_config(f"study_valley:{arg}")
    scale = 32 if smoke else 3072
    c = defaults.study_config(
        "study_pruning" + ("_smoke" if smoke else ""),
        folder="runs/study_pruning_smoke" if smoke else "docs/study/pruning",
        title="Pruned chains of thought, on arithmetic",
        compare=(("pruned", "full"), ("guided", "full"), ("first correct", "full"),
                 ("random", "full"), ("dpo", "full"), ("dpo", "guided"), ("dpo 2e-5", "full"),
                 ("dpo 2e-5", "guided")),
    )  # fmt: skip
    c.cells["start"] = valley.cells["tiny-start"]
    for seed in range(1 if smoke else SEEDS):
        base = valley.cells[f"tiny-pruned-{scale}-{seed}"].config
        prune = base.stages.prune.to_dict()
        prune["init"]["from"] = f"full-{seed}@sft"
        full = valley.cells[f"tiny-one_batch-{scale}-{seed}"].config.stages.sft.to_dict()
        full["init"]["from"] = "start@short"
        stage = {**full, "data": {**full["data"], "sources": base.stages.sft.data.sources}}

        def cell(arm: str, base=base, seed=seed, **stages) -> dict:
            config = base.copy_and_resolve_references()
            config.arithmetic.update(
                num_train=200 if smoke else scale, num_test=60 if smoke else 2000
            )
            config.eval.sets.arithmetic.limit = 0  # all
            config.seed, config.arithmetic.train_seed = seed, seed + 1
            config.stages = stages
            return defaults.cell(config, arm=arm)

        every = ConfigDict(prune)
        every.update({"method": "exhaustive", "init": {"from": "@sft"}})
        every.data.limit = 40 if smoke else 200
        c.cells[f"full-{seed}"] = cell("full", sft=full, exhaustive=every)
        for arm, method in (
            ("pruned", "binary"),
            ("guided", "guided"),
            ("first correct", "first_correct"),
            ("random", "random"),
        ):
            name = f"{arm.replace(' ', '_')}-{seed}"
            c.cells[name] = cell(arm, prune={**prune, "method": method}, sft=stage)
        for arm, rate in (("dpo", 1e-4), ("dpo 2e-5", 2e-5)):
            name = f"{arm.replace(' ', '_')}-{seed}"
            c.cells[name] = cell(arm, dpo=_dpo(stage, seed, smoke, rate))
    return c


def _dpo(stage: dict, seed: int, smoke: bool, rate: float) -> ConfigDict:
    """beta 0.1 and 0.3 of the SFT loss (objective `pruning`); a pair of rows holds both chains."""
    dpo = ConfigDict(stage)
    dpo.init["from"] = f"guided-{seed}@sft"
    dpo.data.sources = {
        "pairs": defaults.source(
            name="pairs",
            path=f"guided-{seed}@prune.pairs",
            prompt_field="prompt",
            chosen_field="chosen",
            rejected_field="rejected",
        )
    }
    dpo.data.update(packing="first_fit", rows=16, length=448, examples_per_batch=None)
    dpo.train.update(objective="pruning", steps=2 if smoke else 64)
    dpo.train.optimizer.update(learning_rate=rate, warmup_steps=1 if smoke else 6)
    return dpo
