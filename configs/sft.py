"""Supervised fine-tuning on GSM8K's worked solutions, as chains of thought.

  python -m jaxreason.launch --config=sft         a 15M-parameter model from random weights, CPU
  python -m jaxreason.launch --config=sft:smoke   the same in under 3 minutes
  python -m jaxreason.launch --config=sft:hf --config.init.from=DIR    any Hugging Face model
  python -m jaxreason.launch --config=sft:lora --config.init.from=DIR  the same by LoRA adapters

DIR's own chat template is trained with; a base model that has none wants
--config.chat.template=qwen3, plain or a .jinja file.

Data: gsm8k/train.jsonl.gz and gsm8k/test.jsonl.gz under $JAXREASON_DATA (default ../shared/data),
records with `question` and `answer`; the solution before `#### N` becomes the reasoning.

The default run exists to show real data through the real tokenizer: Qwen3's 151,669 entries make
14.6M of its 14.9M parameters an embedding, 50 updates teach it the format and no arithmetic, so
expect about 0 of the 200 graded test questions. `:hf` is the run to learn from: 3 epochs of 64
problems an update at learning rate 1e-5. `:lora` trains adapters of rank 32 to every matrix of the
layers at ten times that rate, as adapters want (J. Schulman, "LoRA Without Regret", 2025): for a
Qwen3-1.7B 35M numbers, so that weights, gradients and optimizer take 4 GB where `:hf` takes 28 GB.
Neither has been run yet: no GPU so far.
"""

from ml_collections import ConfigDict

from jaxreason.recipes import defaults


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke", "hf", "lora"):
        raise ValueError(f"--config=sft:{arg}: the argument is nothing, smoke, hf or lora")
    c = defaults.default_config("sft", "fit")
    c.update(defaults.stage_config())
    c.tokenizer.update(kind="hf", path="tokenizer_qwen3")
    c.model = defaults.model_config(
        "qwen3-tiny", vocab_size=151_936, embed_dim=96, mlp_dim=256, num_layers=2, head_dim=32
    )
    c.data.sources = {
        "gsm8k": defaults.source(
            name="gsm8k",
            path="gsm8k/train.jsonl.gz",
            prompt_field="question",
            response_field="answer",
            reasoning="split_hashes",
            strip_calculator=True,
        )
    }
    c.data.update(rows=8, length=512)
    c.train.steps = 50
    c.train.optimizer.update(learning_rate=3e-3, warmup_steps=10)
    c.run.save_every, c.log.every = 25, 5
    c.eval.rows = 100
    c.eval.sets = {
        "gsm8k": defaults.jsonl_eval(
            "gsm8k/test.jsonl.gz", num_samples=1, temperature=0.0, top_p=1.0, max_tokens=160
        )
    }
    if arg == "smoke":
        c.train.steps = 6
        c.data.update(rows=4)
        c.train.optimizer.warmup_steps = 2
        c.run.save_every = 3
        c.eval.rows = 8
        c.eval.sets.gsm8k.update(limit=8, max_tokens=24)
    if arg in ("hf", "lora"):
        _from_hugging_face(c)
    if arg == "lora":
        c.name = "sft-lora"
        c.train.lora.update(rank=32, alpha=32.0)
        c.train.optimizer.learning_rate = 1e-4
    return c


def _from_hugging_face(c: ConfigDict) -> None:
    c.name = "sft-hf"
    c.init["from"] = ""
    c.tokenizer.update(kind="checkpoint", path="")
    c.chat.template = "checkpoint"
    c.model = defaults.model_config()
    c.mesh.remat = "full"
    c.data.update(rows=64, length=1024, num_shards=8)
    c.train.steps = 120  # GSM8K's 7,473 problems fill about 40 such batches
    c.train.optimizer.update(learning_rate=1e-5, warmup_steps=6, weight_decay=0.0)
    c.run.save_every = 40
    c.run.export_dtype = "bfloat16"
    c.eval.rows = 512
    c.eval.sets.gsm8k.update(
        limit=1319, num_samples=4, temperature=0.6, top_p=0.95, top_k=20, max_tokens=1024
    )
