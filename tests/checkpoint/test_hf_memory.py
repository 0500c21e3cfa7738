"""Importing two billion parameters: memory, and seconds beside transformers' own loading.

Run it alone on a calm machine, with its figures:
  pytest -s -m slow tests/checkpoint/test_hf_memory.py
"""

import json
import pathlib
import subprocess
import sys
import threading
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

MAKE = """
import sys, torch, transformers
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
config = transformers.Qwen3Config(
    vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28,
    num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
model = transformers.Qwen3ForCausalLM(config)
model.save_pretrained(sys.argv[1], max_shard_size="1GB")
"""
# Each loads, then touches every weight: the exclusive or of all 16-bit words does not depend on how
# they are laid out, so that both ways must give the same number.
CHECKSUM = """
import json, sys, time
import numpy as np
def checksum(arrays):
    total = 0
    for array in arrays:
        words = np.bitwise_xor.reduce(array.reshape(-1).view(np.uint64))
        total ^= int(np.bitwise_xor.reduce(np.atleast_1d(words).view(np.uint16)))
    return total
def ready():
    print("ready", flush=True)
    sys.stdin.readline()
    return time.perf_counter()
def report(began, total, num_bytes=0, largest=0):
    seconds = time.perf_counter() - began
    print(json.dumps([seconds, total, num_bytes, largest]), flush=True)
    sys.stdin.readline()
"""
HERE = (
    CHECKSUM
    + """
import jax
from jaxreason.checkpoint import hf
jax.device_put(np.zeros(1)).block_until_ready()
began = ready()
_, params = hf.import_hf(sys.argv[1], dtype=None)
leaves = jax.tree.leaves(params)
sizes = sorted(leaf.nbytes for leaf in leaves)
report(began, checksum(np.asarray(leaf) for leaf in leaves), sum(sizes), sum(sizes[-2:]))
"""
)
THERE = (
    CHECKSUM
    + """
import torch, transformers
from transformers import Qwen3ForCausalLM  # the modules that from_pretrained imports
began = ready()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
if len(sys.argv) > 2:
    for p in model.parameters():
        p.data = p.data.clone()
report(began, checksum(p.detach().view(torch.int16).numpy() for p in model.parameters()))
"""
)

# A virtual machine takes seconds for memory that it has not used of late, the first to ask pays.
WARM = "import numpy; numpy.ones(6 * 10**9, numpy.uint8)"


def anonymous_bytes(pid: int) -> int:
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no RssAnon in /proc/PID/status")


def measured(code: str, *arguments: str) -> dict[str, float]:
    """Runs it in a process of its own, watching that process's memory every 5 ms."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, **pipes)
    seen, over = [], threading.Event()

    def watch():
        while not over.is_set():
            seen.append(anonymous_bytes(child.pid))
            time.sleep(0.005)

    assert child.stdout.readline() == "ready\n"
    subprocess.run([sys.executable, "-c", WARM], check=True)
    watcher = threading.Thread(target=watch)
    base = anonymous_bytes(child.pid)
    watcher.start()
    print(file=child.stdin, flush=True)
    seconds, total, num_bytes, largest = json.loads(child.stdout.readline())
    over.set()
    watcher.join()
    child.communicate("\n")
    return dict(seconds=seconds, checksum=total, base=base, peak=max(seen), bytes=num_bytes,
                largest=largest)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_two_billion_parameters_stream(tmp_path):
    pytest.importorskip("torch", reason="transformers writes the checkpoint")
    pytest.importorskip("transformers")
    folder = tmp_path / "hf"
    try:
        subprocess.run([sys.executable, "-c", MAKE, str(folder)], check=True)
        assert len(list(folder.glob("*.safetensors"))) > 2
        ways = ((HERE, str(folder)), (THERE, str(folder)), (THERE, str(folder), "copy"))
        runs = [[measured(*way) for way in ways] for _ in range(3)]
    finally:
        for shard in folder.glob("*.safetensors"):
            shard.unlink()
    mib = lambda number: f"{number / 2**20:,.0f} MiB"
    for here, mapped, copied in runs:
        print(
            f"\nhere {here['seconds']:.2f} s; from_pretrained {mapped['seconds']:.2f} s, which maps"
            f" the files, {copied['seconds']:.2f} s with the weights in memory of its own\n"
            f"RssAnon: base {mib(here['base'])}, peak {mib(here['peak'])}, the result "
            f"{mib(here['bytes'])}, the two largest arrays {mib(here['largest'])}"
        )
        assert here["checksum"] == mapped["checksum"] == copied["checksum"] != 0
        assert here["bytes"] > 2 * 2e9
        assert here["peak"] <= here["bytes"] + here["largest"] + here["base"]
    # Whoever trains needs memory to write to. from_pretrained alone leaves the weights in the page
    # cache: nothing that stacks layers can be as quick, and the figure is printed, not asked for.
    here, copied = (min(run[way]["seconds"] for run in runs) for way in (0, 2))
    assert here <= 1.2 * copied, f"{here:.2f} s here, {copied:.2f} s in transformers"
