"""Score any checkpoint: `init.from` names it, `eval.sets` what it is scored on."""

import pathlib
import time

from ml_collections import ConfigDict

from jaxreason.recipes import assemble, checkpoints, evaluation, weights
from jaxreason.recipes.pipeline import describe, evaluate_once, finish, prepare_data
from jaxreason.recipes.workdir import Workdir
from jaxreason.train.metrics import Progress


def run(config: ConfigDict, folder: pathlib.Path) -> None:
    began, progress = time.monotonic(), Progress()
    start = checkpoints.parse(config.init["from"])
    if start.kind == "run" and start.directory is None:
        raise ValueError(
            f"init.from is {start.text!r}; an evaluation has no stages of its own: give "
            "WORKDIR@STAGE[@STEP] or a Hugging Face directory"
        )
    shape = assemble.architecture(config, start)
    workdir = Workdir(folder)
    workdir.open(config)
    tokenizer = assemble.tokenizer(config, workdir, start)
    model = assemble.language_model(config, shape, tokenizer)
    prepare_data(config, workdir, progress)
    evaluate = evaluation.build(config, workdir, tokenizer, model)
    describe(config, workdir, model, tokenizer, shape.max_length)

    def load():
        params = weights.load(start, model, workdir.checkpoints)
        key = assemble.stage_key(config.seed, "init")
        return assemble.random_params(model, key) if params is None else params

    metrics = evaluate_once(config, workdir, evaluate, start.name, load, 0, progress)
    finish(workdir, {}, {start.name: metrics}, time.monotonic() - began, progress)
