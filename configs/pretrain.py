"""Pretraining on text, with a SentencePiece tokenizer trained on the same text.

  python -m jaxreason.launch --config=pretrain           4.2M parameters on public-domain books
  python -m jaxreason.launch --config=pretrain:smoke     the same in under 3 minutes
  python -m jaxreason.launch --config=pretrain:hf --config.init.from=DIR   goes on from a checkpoint
  python -m jaxreason.launch --config=pretrain:b200      1.5B parameters on one DGX B200 (8 GPUs)

Data: JSONL files with a `text` field under $JAXREASON_DATA (default ../shared/data): text_books/
train-*.jsonl.gz and val.jsonl. Any such files do: --config.data.sources.books.path=GLOB.

The default run: 250 updates of 16 x 256 tokens with Muon on 2 CPU cores. docs/benchmarks.md has its
validation bits per byte.

:b200: Qwen3 shape with 24 layers, 1,519,230,976 parameters, 10.32 GFLOP a token (causal, 4,096).
Batch 1,048,576 tokens (256 rows of 4,096), 90,000 updates = 94.4B tokens, WSD schedule with the
last 15 % in decay, learning rate 6e-4. The mesh is the one that tools/tune_mesh.py finds fastest:
predicted, not measured, 396,000 tokens/s (23 % MFU), so 66 hours; what binds is attention, which
is `blockwise` (docs/scaling.md). Put the mixture's files under
$JAXREASON_DATA/pretrain/{web,math,code}/*.jsonl.gz and a tokenizer.json directory at
$JAXREASON_DATA/tokenizer_qwen3.
"""

from ml_collections import ConfigDict

from jaxreason.recipes import defaults


def get_config(arg: str = "") -> ConfigDict:
    makers = {"": _books, "smoke": _smoke, "hf": _from_hugging_face, "b200": _b200}
    if arg not in makers:
        raise ValueError(f"--config=pretrain:{arg}: the argument is nothing, smoke, hf or b200")
    return makers[arg]()


def _books() -> ConfigDict:
    c = defaults.default_config("pretrain", "fit")
    c.update(defaults.stage_config())
    c.tokenizer.update(
        kind="sentencepiece", path="text_books/train-*.jsonl.gz", vocab_size=4096,
        max_bytes=5_000_000,
    )  # fmt: skip
    c.model = defaults.model_config(
        "qwen3-tiny", vocab_size=4096, embed_dim=256, mlp_dim=768, head_dim=64
    )
    c.data.sources = {
        "books": defaults.source(
            name="books", path="text_books/train-*.jsonl.gz", text_field="text"
        )
    }
    # A book is read from end to end: a shard a row, so that an update reads sixteen books.
    c.data.update(rows=16, length=256, packing="concat", num_shards=16)
    c.train.steps = 250
    c.train.optimizer.update(
        name="muon", learning_rate=4e-3, warmup_steps=20, schedule="wsd", decay_steps=100
    )
    c.run.save_every = 50
    c.eval.every = 50
    c.eval.sets = {"books": defaults.text_eval("text_books/val.jsonl", length=256)}
    return c


def _smoke() -> ConfigDict:
    c = _books()
    c.model = defaults.model_config("qwen3-tiny", vocab_size=1024)
    c.tokenizer.update(vocab_size=1024, max_bytes=500_000)
    c.data.update(rows=8, length=128, num_shards=8)
    c.train.steps = 20
    c.train.optimizer.update(warmup_steps=5, decay_steps=5)
    c.run.save_every, c.log.every, c.eval.every = 10, 5, 0
    c.eval.sets.books.update(max_batches=4, rows=8, length=128)
    return c


def _from_hugging_face() -> ConfigDict:
    """The same books, by a model that has read before: its tokenizer, a tenth of its first rate."""
    c = _books()
    c.name = "pretrain-hf"
    c.init["from"] = ""
    c.tokenizer = defaults.default_config("", "fit").tokenizer
    c.tokenizer.kind = "checkpoint"
    c.chat.template = "plain"  # text has no turns
    c.model = defaults.model_config()
    c.mesh.remat = "full"
    c.data.update(rows=64, length=2048)
    c.train.optimizer.update(
        name="adamw", learning_rate=2e-5, warmup_steps=20, schedule="cosine", decay_steps=0
    )
    c.run.export_dtype = "bfloat16"
    c.eval.sets.books.update(length=2048)
    return c


def _b200() -> ConfigDict:
    c = defaults.default_config("pretrain-b200", "fit")
    c.update(defaults.stage_config())
    c.tokenizer.update(kind="hf", path="tokenizer_qwen3")
    c.model = defaults.model_config("qwen3-1.5b")
    c.mesh.shape.update(data=1, fsdp=-1)
    c.mesh.update(microbatches=4, remat="none")
    c.data.sources = {
        name: defaults.source(name=name, path=f"pretrain/{name}/*.jsonl.gz", text_field="text")
        for name in ("web", "math", "code")
    }
    c.data.weights = {"web": 0.6, "math": 0.25, "code": 0.15}
    c.data.update(rows=256, length=4096, packing="concat", num_shards=8)
    c.train.steps = 90_000
    c.train.z_loss = 1e-5
    c.train.optimizer.update(
        learning_rate=6e-4, warmup_steps=2_000, schedule="wsd", decay_steps=13_500,
        final_scale=0.0,
    )  # fmt: skip
    c.run.save_every = 1_000
    c.run.export_dtype = "bfloat16"
    c.eval.every = 1_000
    return c
