"""Score any checkpoint.

  python -m jaxreason.launch --config=eval --config.init.from=DIR              GSM8K test
  python -m jaxreason.launch --config=eval:arithmetic --config.init.from=DIR   arithmetic probe
  python -m jaxreason.launch --config=eval:smoke                               random weights

DIR is a Hugging Face directory, hf://ORG/NAME, a PEFT adapter or WORKDIR[@STAGE[@STEP]], e.g.
runs/quickstart@sft_cot. Model shape, tokenizer and chat template come from there.

:arithmetic is the error-accumulation probe of the long-CoT study (Luo et al., EMNLP 2025, section
1.3 of its setup): 5 to 15 operations over integers 1 to 100, every intermediate result an integer,
400 items x 4 samples at temperature 0.6, top-p 0.95. For a model trained on another prompt set
--config.eval.sets.arithmetic.prompt_template (the quickstart's is '{expression}=').
"""

from ml_collections import ConfigDict

from jaxreason.recipes import defaults


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "arithmetic", "smoke"):
        raise ValueError(f"--config=eval:{arg}: the argument is nothing, arithmetic or smoke")
    c = defaults.default_config("eval", "evaluate")
    c.init = {"from": ""}
    c.tokenizer.kind = "checkpoint"
    c.chat.template = "checkpoint"
    if arg == "":
        c.eval.sets = {
            "gsm8k": defaults.jsonl_eval("gsm8k/test.jsonl.gz", limit=1319, num_samples=4)
        }
        return c
    c.name = f"eval-{arg}"
    c.arithmetic = defaults.arithmetic_config(
        min_operations=5, max_operations=15, max_operand=100, num_train=1, num_test=400
    )
    c.eval.sets = {"arithmetic": defaults.arithmetic_eval(num_samples=4, max_tokens=4096)}
    if arg == "smoke":
        c.init["from"] = "random"
        c.tokenizer.kind = "bytes"
        c.chat.template = "plain"
        c.model = defaults.model_config("qwen3-tiny")
        c.arithmetic.num_test = 11
        c.eval.rows = 44
        c.eval.sets.arithmetic.update(limit=11, max_tokens=32)
    return c
