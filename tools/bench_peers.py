"""transformers and torch on the same weights and shapes: what tools/bench.py measures against.

Functions of whole models return variants, by name, of one piece of work; the fastest of them is the
peer. Those of kernels take our arrays, which torch reads where they are, and return `Timed`s.
"""

import contextlib
import functools
import importlib.util
import math
import pathlib
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from bench_timing import Timed

from jaxreason.checkpoint import hf
from jaxreason.model.config import DecoderConfig
from jaxreason.train.optim import OptimizerConfig
from jaxreason.types import Batch, Params


def missing() -> str | None:
    """Why there is nothing to compare with; None where there is."""
    for name in ("transformers", "safetensors"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    return torch_missing()


def torch_missing() -> str | None:
    """The same of torch alone."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        return f"torch {torch.__version__} has no CUDA"
    if jax.default_backend() not in ("cpu", "gpu"):
        return f"torch does not run on {jax.default_backend()}"
    return None


def no_compiler() -> str:
    """Why torch.compile cannot run; "" where it can."""
    return "" if shutil.which("g++") else "no g++"


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
        with _fastest_attention(device):
            yield model.to(device)


def _fastest_attention(device: str):
    """cuDNN's before the others: 1.7 to 2.3 times torch's own choice on Hopper."""
    if device == "cpu":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    return sdpa_kernel([getattr(SDPBackend, name) for name in names], set_priority=True)


# --------------------------------------------------------------------------------- train


def train_steps(
    model, batch: Batch, config: OptimizerConfig, autocast: bool, compiled: bool
) -> tuple[dict[str, Callable], str]:
    """({variant: step}, a remark). A step is a whole update with AdamW and returns its loss.

    Optimizers hold their own moments but share the model's weights.
    """
    import torch

    forwards, remark = {"eager": model}, ""
    if compiled and no_compiler():
        remark = f"torch.compile left out: {no_compiler()}"
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


# ------------------------------------------------------------------------------- kernels


def torch_backends() -> dict[str, str | None]:
    """{name of an entrant: the backend of torch's attention that it asks for}."""
    if jax.default_backend() == "cpu":
        return {"torch": None}
    return {"torch cudnn": "CUDNN_ATTENTION", "torch flash": "FLASH_ATTENTION"}


def attention(
    operands: Sequence[tuple[jax.Array, jax.Array, jax.Array]],
    backend: str | None,
    dout_BTNH: jax.Array | None = None,
    see_BTS: jax.Array | None = None,
    causal: bool = True,
) -> Timed:
    """Attention of every (q_BTNH, k_BSKH, v_BSKH); `see_BTS`, without `causal`: which keys count.

    Makes a list of {"out"}; with `dout_BTNH`, of one triple alone, {"out", "dq", "dk", "dv"}.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    triples = [[_torch(x) for x in triple] for triple in operands]
    mask = None if see_BTS is None else _torch(see_BTS)[:, None]
    dout = None if dout_BTNH is None else _torch(dout_BTNH)
    for leaf in triples[0]:
        leaf.requires_grad_(dout is not None)
    choose = contextlib.nullcontext
    if backend:
        choose = functools.partial(sdpa_kernel, getattr(SDPBackend, backend))

    def one(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
        )
        return out.transpose(1, 2)

    def run():
        with choose():
            if dout is None:
                with torch.no_grad():
                    return [{"out": one(*triple)} for triple in triples]
            out = one(*triples[0])
            gradients = torch.autograd.grad(out, triples[0], dout)
        return {"out": out} | dict(zip(("dq", "dk", "dv"), gradients))

    return _heard(Timed(run, _wait))


def linear_xent(h_TD: jax.Array, w_VD: jax.Array, targets_T: jax.Array, backward: bool) -> Timed:
    """The mean cross-entropy of a linear head as torch's users write it."""
    import torch

    h, w, targets = _torch(h_TD), _torch(w_VD), _torch(targets_T).long()
    h.requires_grad_(backward), w.requires_grad_(backward)

    def run():
        loss = torch.nn.functional.cross_entropy((h @ w.T).float(), targets)
        if not backward:
            return {"loss": loss}
        return {"loss": loss.detach()} | dict(zip(("dh", "dw"), torch.autograd.grad(loss, (h, w))))

    return Timed(run, _wait)


def _torch(x: jax.Array):
    """The same memory as a tensor."""
    import torch

    return torch.from_dlpack(jax.block_until_ready(x))


def _wait(made) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _heard(run: Timed) -> Timed:
    """Run once; what torch then warns of (why no kernel will do) becomes part of its error."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            run.once()
        except RuntimeError as error:
            said = "; ".join(str(w.message).split(" (Triggered")[0] for w in warned)
            raise RuntimeError(f"{said or error}") from error
    return run
