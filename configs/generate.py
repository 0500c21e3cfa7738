"""Talk with any checkpoint, or have it answer a file of questions.

  python -m jaxreason.launch --config=generate --config.init.from=DIR
  python -m jaxreason.launch --config=generate --config.init.from=DIR --config.prompts=FILE
  python -m jaxreason.launch --config=generate:smoke < FILE        random weights

DIR is a Hugging Face directory, hf://ORG/NAME, a PEFT adapter or WORKDIR[@STAGE[@STEP]], e.g.
runs/quickstart@sft_cot. Model shape, tokenizer and chat template come from there. No
workdir is made.

On the terminal a line is a question, and its answer appears as it is sampled, the thinking dim.
/think 256 limits the thinking, /reset begins anew, /quit ends. A question goes through
prompt_template: for the quickstart's models, which know expressions, --config.prompt_template=
'{prompt}='. From a pipe each line is answered in turn, with nothing but answers on the output.

FILE is JSONL, its fields named in prompt_template (GSM8K: '{question}'), or a text with a question
a line. Line i of --config.output answers question i; the same command goes on where it stopped.

Sampling defaults are Qwen3's for thinking (arXiv 2505.09388): temperature 0.6, top-p 0.95, top-k
20.
"""

from ml_collections import ConfigDict

from jaxreason.recipes import defaults


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"--config=generate:{arg}: the argument is nothing or smoke")
    c = defaults.default_config("generate", "generate")
    c.update(defaults.generate_config())
    c.tokenizer.kind = "checkpoint"
    c.chat.template = "checkpoint"
    if arg == "smoke":
        c.init["from"] = "random"
        c.tokenizer.kind = "bytes"
        c.chat.template = "plain"
        c.model = defaults.model_config("qwen3-tiny", vocab_size=261)
        c.sampling.max_tokens = 32
        c.rows = 4
    return c
