"""transformers and torch on the same weights and shapes: what tools/bench.py measures against.

Each function returns variants, by name, of one piece of work; the fastest of them is the peer.
"""

import contextlib
import importlib.util
import math
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from jaxreason.checkpoint import hf
from jaxreason.model.config import DecoderConfig
from jaxreason.train.optim import OptimizerConfig
from jaxreason.types import Batch, Params

Run = Callable[[], int]  # does the work, returns the tokens it made


def missing() -> str | None:
    """Why there is nothing to compare with; None where there is."""
    for name in ("torch", "transformers", "safetensors"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    import torch

    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        return f"torch {torch.__version__} has no CUDA"
    if jax.default_backend() not in ("cpu", "gpu"):
        return f"torch does not run on {jax.default_backend()}"
    return None


@contextlib.contextmanager
def load(config: DecoderConfig, params: Params, bfloat16: bool) -> Iterator:
    """Our parameters as a transformers model on the device that ours run on."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model"
        hf.export_hf(path, config, jax.tree.map(np.array, params), generation={})
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa"
        )
        yield model.to(device)


# --------------------------------------------------------------------------------- train


def train_steps(
    model, batch: Batch, config: OptimizerConfig, autocast: bool, compiled: bool
) -> tuple[dict[str, Callable], str]:
    """({variant: step}, a remark). A step is a whole update with AdamW and returns its loss.

    Optimizers hold their own moments but share the model's weights.
    """
    import torch

    forwards, remark = {"eager": model}, ""
    if compiled and shutil.which("g++") is None:
        remark = "torch.compile left out: no g++"
    elif compiled:
        forwards["compile"] = torch.compile(model)
    return {
        f"{mode} {kind}": _train_step(model, forward, batch, config, kind, autocast)
        for mode, forward in forwards.items()
        for kind in ("fused", "foreach")
    }, remark


def _train_step(model, forward, batch: Batch, config: OptimizerConfig, kind: str, autocast: bool):
    import torch

    model.train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.b1, config.b2), eps=config.eps,
        weight_decay=config.weight_decay, **{kind: True},
    )  # fmt: skip
    device = model.device
    tokens = torch.from_numpy(np.array(batch.tokens_BT, np.int64)).to(device)
    # cross_entropy takes 0 and 1 for weights, as "ignored" and not.
    targets = np.where(np.array(batch.weights_BT) > 0, np.array(batch.targets_BT, np.int64), -100)
    targets = torch.from_numpy(targets).flatten().to(device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = forward(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


# -------------------------------------------------------------------------------- decode


def generators(model, prompts: list[list[int]], new: int) -> dict[str, Callable[[], np.ndarray]]:
    """{cache: greedy generation of exactly `new` tokens a prompt -> [rows, new]}."""
    import torch

    model.eval()
    ids = torch.tensor(prompts, device=model.device)
    caches = {"dynamic cache": {}, "static cache": {"cache_implementation": "static"}}
    if model.device.type == "cpu":  # there it would compile, to no profit, at every new shape
        caches["static cache"]["disable_compile"] = True

    def run(options) -> np.ndarray:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **options
        )
        return out[:, ids.shape[1] :].cpu().numpy()

    return {name: lambda options=options: run(options) for name, options in caches.items()}


def rollouts(
    model, prompts: list[list[int]], limits: list[int], batches: Sequence[int]
) -> dict[str, Callable[..., list[list[int]]]]:
    """{variant: greedy generation of its own number of tokens for each prompt -> their ids}.

    Each takes the seconds it may last and raises TimeoutError after them.
    """
    import torch

    model.eval()

    def by(size: int, seconds: float) -> list[list[int]]:
        found, end = [], time.monotonic() + seconds
        for start in range(0, len(prompts), size):
            part, wanted = prompts[start : start + size], limits[start : start + size]
            longest, new = max(map(len, part)), max(wanted)
            pads = [longest - len(p) for p in part]
            ids = torch.tensor([[0] * n + p for n, p in zip(pads, part)], device=model.device)
            mask = torch.tensor(
                [[0] * n + [1] * len(p) for n, p in zip(pads, part)], device=model.device
            )
            left = None if seconds == math.inf else max(end - time.monotonic(), 0.0)
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=new, do_sample=False, max_time=left
            )
            rows = out[:, longest:].tolist()
            if len(rows[0]) < new or time.monotonic() > end:
                raise TimeoutError
            found += [row[:n] for row, n in zip(rows, wanted)]
        return found

    def batched(size: int) -> Callable[..., list[list[int]]]:
        return lambda seconds=math.inf: by(size, seconds)

    def continuously(seconds: float = math.inf) -> list[list[int]]:
        return _continuously(model, prompts, limits, seconds)

    runs = {f"generate by {size}": batched(size) for size in batches}
    return runs | {"continuous batching": continuously}


def best_rollout(runs: dict[str, Callable[..., list]]) -> tuple[str, list[list[int]]]:
    """(name, result) of the fastest; a run ends when it has taken longer than the best before."""
    best, name, made = math.inf, None, None
    for candidate, run in runs.items():
        start = time.perf_counter()
        try:
            found = run(best)
        except TimeoutError:
            continue
        seconds = time.perf_counter() - start
        if seconds < best:
            best, name, made = seconds, candidate, found
    return name, made


def _continuously(
    model, prompts: list[list[int]], limits: list[int], seconds: float
) -> list[list[int]]:
    """transformers' own continuous batching, with room for all requests at once."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    page = 256
    blocks = sum(-(-(len(p) + n) // page) for p, n in zip(prompts, limits))
    manager = model.continuous_batching_context_manager(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=page, num_blocks=blocks + 8, max_batch_tokens=1024
        ),
        block=True,
        timeout=60,
    )
    found, end = {}, time.monotonic() + seconds
    with manager as running:
        names = [running.add_request(p, max_new_tokens=n) for p, n in zip(prompts, limits)]
        while len(found) < len(names):
            if time.monotonic() > end:
                raise TimeoutError
            result = running.get_result(timeout=1)
            if result is not None and result.is_finished():
                found[result.request_id] = result.generated_tokens
            elif result is None and not running.is_running():
                raise RuntimeError("transformers' continuous batching ended before its requests")
    return [found[name] for name in names]


def first_differences(model, prompts: list[list[int]], ours: np.ndarray, theirs: np.ndarray):
    """For each row whose tokens differ: the gap of the peer's two best logits where they part."""
    import torch

    gaps = []
    for row in np.flatnonzero((ours != theirs).any(axis=1)):
        t = int(np.argmax(ours[row] != theirs[row]))
        ids = torch.tensor([[*prompts[row], *theirs[row, :t].tolist()]], device=model.device)
        with torch.no_grad():
            best = model(ids).logits[0, -1].float().topk(2).values
        gaps.append(float(best[0] - best[1]))
    return gaps
