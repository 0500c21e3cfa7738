"""Long chains cut to what their student needs: what is lost in accuracy, what is saved in tokens.

  python -m jaxreason.launch --config=study_pruning          2 CPU cores, 2 hours, other jobs beside
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
granted, that a longer prefix is never worse, is said in its file under stages.exhaustive. As
`guided` and `dpo 2e-5` were chosen by looking at these seeds, both run `again`, beside `full`, with
three that nothing was chosen by.
"""

from ml_collections import ConfigDict

from jaxreason.launch import load_config
from jaxreason.recipes import defaults

SEEDS = 3
AGAIN = 3  # further seeds, run after every choice was made


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"--config=study_pruning:{arg}: the argument is nothing or smoke")
    smoke = arg == "smoke"
    valley = load_config(f"study_valley:{arg}")
    scale = 32 if smoke else 3072
    again = (("guided again", "full again"), ("dpo 2e-5 again", "guided again"))
    c = defaults.study_config(
        "study_pruning" + ("_smoke" if smoke else ""),
        folder="runs/study_pruning_smoke" if smoke else "docs/study/pruning",
        title="Pruned chains of thought, on arithmetic",
        compare=(("pruned", "full"), ("guided", "full"), ("first correct", "full"),
                 ("random", "full"), ("dpo", "full"), ("dpo", "guided"), ("dpo 2e-5", "full"),
                 ("dpo 2e-5", "guided"), *(() if smoke else again)),
    )  # fmt: skip
    c.cells["start"] = valley.cells["tiny-start"]
    base = valley.cells[f"tiny-pruned-{scale}-0"].config
    full = valley.cells[f"tiny-one_batch-{scale}-0"].config.stages.sft.to_dict()
    full["init"]["from"] = "start@short"
    stage = {**full, "data": {**full["data"], "sources": base.stages.sft.data.sources}}
    seeds = 1 if smoke else SEEDS
    for seed in range(seeds if smoke else SEEDS + AGAIN):
        prune = base.stages.prune.to_dict()
        prune["init"]["from"] = f"full-{seed}@sft"
        every = ConfigDict(prune)
        every.update({"method": "exhaustive", "init": {"from": "@sft"}})
        every.data.limit = 40 if smoke else 200
        arms = {
            "full": {"sft": full, "exhaustive": every},
            "pruned": {"prune": {**prune, "method": "binary"}, "sft": stage},
            "guided": {"prune": {**prune, "method": "guided"}, "sft": stage},
            "first correct": {"prune": {**prune, "method": "first_correct"}, "sft": stage},
            "random": {"prune": {**prune, "method": "random"}, "sft": stage},
            "dpo": {"dpo": _dpo(stage, seed, smoke, 1e-4)},
            "dpo 2e-5": {"dpo": _dpo(stage, seed, smoke, 2e-5)},
        }
        if seed >= seeds:
            arms = {
                "full": {"sft": full},
                "guided": arms["guided"],
                "dpo 2e-5": arms["dpo 2e-5"],
            }
        for arm, stages in arms.items():
            config = base.copy_and_resolve_references()
            config.arithmetic.update(
                num_train=200 if smoke else scale, num_test=60 if smoke else 2000
            )
            config.eval.sets.arithmetic.limit = 0  # all
            config.seed, config.arithmetic.train_seed = seed, seed + 1
            config.stages = stages
            name = f"{arm.replace(' ', '_')}-{seed}"
            label = arm if seed < seeds else f"{arm} again"
            c.cells[name] = defaults.cell(config, arm=label)
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
