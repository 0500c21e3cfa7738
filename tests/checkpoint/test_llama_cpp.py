"""An export in llama.cpp, through llama.cpp's own converter.

Needs the package llama-cpp-python (its source archive holds all of llama.cpp, converter included;
ten minutes to build) and JAXREASON_LLAMA_CPP, the path of that archive's vendor/llama.cpp.
"""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxreason.checkpoint import hf
from jaxreason.model.config import preset
from jaxreason.model.decoder import LanguageModel
from jaxreason.rollout.engine import EngineConfig
from jaxreason.rollout.generate import build_generate
from jaxreason.text.tokenizer import load_tokenizer
from jaxreason.types import Sampling

SMALL = dict(
    vocab_size=151_669, num_layers=3, embed_dim=128, mlp_dim=256, num_heads=4, num_kv_heads=2,
    head_dim=32, init_std=0.1, tie_embeddings=True,
)  # fmt: skip
FAMILIES = {
    "qwen3-0.6b": {},
    "qwen3-30b-a3b": dict(num_experts=8, experts_per_token=2),
    "qwen2.5-0.5b": {},
    "llama-3.2-1b": {},
    "gemma-3-1b": dict(num_layers=7, sliding_layers=(0, 1, 2, 3, 4, 6), window=16,
                       attention_scale=32**-0.5),
}  # fmt: skip
TEXT = "The quick brown fox jumps over the lazy dog. What is 17 times 3?"


@pytest.fixture
def llama_cpp():
    if "JAXREASON_LLAMA_CPP" not in os.environ:
        pytest.skip("JAXREASON_LLAMA_CPP names no folder of llama.cpp")
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def convert(directory: pathlib.Path, target: pathlib.Path) -> None:
    source = pathlib.Path(os.environ["JAXREASON_LLAMA_CPP"])
    command = [sys.executable, source / "convert_hf_to_gguf.py", directory]
    subprocess.run(
        [*command, "--outfile", target, "--outtype", "f32"],
        env=os.environ | {"PYTHONPATH": str(source / "gguf-py")}, check=True, capture_output=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_is_ours(name, llama_cpp, shared_data, tmp_path):
    """64 tokens, up to a step that is a near tie, and the same ids of a text."""
    tokenizer = load_tokenizer(shared_data / "tokenizer_qwen3")
    config = preset(name, **SMALL | FAMILIES[name])
    model = LanguageModel(config)
    params = jax.jit(model.init)(jax.random.key(0))
    ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    hf.export_hf(tmp_path / "hf", config, params, generation=ids, save_tokenizer=tokenizer.save)
    convert(tmp_path / "hf", tmp_path / "model.gguf")

    prompt = tokenizer.encode(TEXT)
    generate = build_generate(model, list, str, tokenizer.eos_id, EngineConfig(slots=1))
    sampling = Sampling(max_tokens=64, temperature=0.0, ignore_eos=True)
    ours = list(generate(params, [prompt], sampling, jax.random.key(0))[0][0].ids)
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=256, verbose=False)
    assert theirs.tokenize(TEXT.encode(), add_bos=False) == prompt
    drawn = theirs.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0)
    found = [next(drawn) for _ in range(64)]
    certain = near_tie(model, params, prompt, ours)
    assert found[:certain] == ours[:certain]


def near_tie(model, params, prompt, drawn) -> int:
    """The first step whose two best logits are closer than 1e-4; 64 where none are."""
    tokens = np.array([prompt + drawn])
    positions = np.arange(tokens.shape[1])[None]
    h_BTD = model.hidden(params, tokens, np.ones_like(tokens), positions)
    logits_TV = h_BTD[0, len(prompt) - 1 : -1] @ model.head_weight(params).T
    best_T2 = jax.lax.top_k(logits_TV, 2)[0]
    close = np.flatnonzero(best_T2[:, 0] - best_T2[:, 1] < 1e-4)
    certain = int(close[0]) if close.size else 64
    assert certain >= 32
    return certain
