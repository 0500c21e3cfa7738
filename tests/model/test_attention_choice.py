"""Which attention runs: what each implementation can do, what `auto` takes, what is refused."""

import dataclasses
import functools

import jax
import pytest
from simulated_kernels import RUN_HERE
from tiny_models import mean_loss, packed_batch, tiny_model, tiny_params

from jaxreason.kernels.ring import Kernel
from jaxreason.model import attention
from jaxreason.model.attention import Use, choose
from jaxreason.model.execution import Execution

H200 = Use(platform="cuda", dtype="bfloat16", head_dim=128, capability="9.0")
B200 = dataclasses.replace(H200, capability="10.0")
TPU = Use(platform="tpu", dtype="bfloat16", head_dim=128)
CPU = Use(platform="cpu", dtype="float32", head_dim=64)


@pytest.mark.parametrize(
    "use, chosen",
    [
        (CPU, "blockwise"),
        (TPU, "blockwise"),
        (H200, "blockwise"),  # packed
        (dataclasses.replace(H200, segments=False), "cudnn"),
        (dataclasses.replace(H200, segments=False, dtype="float32"), "blockwise"),
        (dataclasses.replace(H200, segments=False, head_dim=256), "blockwise"),
        (dataclasses.replace(H200, segments=False, parts=True), "blockwise"),
    ],
)
def test_auto_takes_what_is_able_and_has_run(use, chosen):
    assert choose("auto", use) == chosen
    assert choose(chosen, use) == chosen


def test_a_kernel_that_has_not_run_on_its_chip_is_taken_by_name():
    for use in (H200, B200):
        assert choose("flash", use) == "flash"
    assert choose("splash", TPU) == "splash"
    assert choose("flash_sm90", H200) == "flash_sm90"
    for capability in ("10.0", "10.3"):
        use = dataclasses.replace(B200, capability=capability)
        assert choose("flash_sm100", use) == "flash_sm100"


@pytest.mark.parametrize(
    "name, use, reasons",
    [
        ("cudnn", H200,
         ["cudnn: cannot keep packed documents apart", "use flash, flash_sm90, blockwise or ref"]),
        ("flash", dataclasses.replace(H200, head_dim=512),
         ["flash: head_dim is at most 256, not 512", "splash: runs on tpu, not cuda"]),
        ("flash_sm90", B200,
         ["flash_sm90: is for compute capability 9.0, not 10.0", "use flash, flash_sm100, "]),
        ("flash_sm100", H200,
         ["flash_sm100: is for compute capability 10.0, not 9.0", "use flash, flash_sm90, "]),
        ("flash_sm90", dataclasses.replace(H200, dtype="float32"),
         ["flash_sm90: takes bfloat16, not float32"]),
        ("tokamax", H200, ["tokamax: ", "cannot keep packed documents apart"]),
        ("flash", TPU, ["flash: runs on gpu, not tpu", "use splash, blockwise or reference"]),
        ("splash", dataclasses.replace(TPU, parts=True),
         ["splash: cannot merge parts of a row that is split over devices"]),
        ("cudnn", dataclasses.replace(CPU, offset=True),
         ["runs on gpu, not cpu, takes bfloat16, not float32", "from before the first query"]),
    ],
)  # fmt: skip
def test_what_is_refused_has_every_implementation_s_reason(name, use, reasons):
    with pytest.raises(ValueError, match=f"mesh.attention is '{name}', which cannot") as refused:
        choose(name, use)
    for reason in reasons:
        assert reason in str(refused.value)


def test_a_run_says_what_it_chose_and_why_not_the_others():
    assert attention.said("blockwise", CPU) == "attention: blockwise"
    line = attention.said("blockwise", H200)
    assert line.startswith("attention: blockwise (cudnn cannot keep packed documents apart; flash ")
    assert "flash_sm90 has not run on a chip of ours" in line
    assert "flash_sm100 is for compute capability 10.0, not 9.0" in line and "splash" not in line
    assert "flash has" not in attention.said("flash", H200)


def test_a_deterministic_run_takes_the_ordered_form(monkeypatch):
    """Of kernels that have one: others have the same bits in every run anyway."""
    taken = []
    here = attention.IMPLEMENTATIONS["blockwise"]

    def kernel(name):
        return Kernel(lambda *args: taken.append(name) or here.kernel.attention(*args), None)

    both = dataclasses.replace(here, kernel=kernel("plain"), ordered=kernel("ordered"))
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "blockwise", both)
    batch = packed_batch([[20, 12]], length=32)
    for deterministic, name in ((False, "plain"), (True, "ordered")):
        taken.clear()
        model = tiny_model(execution=Execution(attention="blockwise", deterministic=deterministic))
        jax.eval_shape(functools.partial(mean_loss, model), tiny_params(), batch)
        assert set(taken) == {name}


@pytest.mark.usefixtures("simulated_kernels")
@pytest.mark.parametrize("name", RUN_HERE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kernel_is_held_against_the_reference(name, dtype):
    attention.check(name, dataclasses.replace(CPU, dtype=dtype, window=True))


@pytest.mark.usefixtures("simulated_kernels")
def test_a_kernel_that_is_wrong_is_refused_with_both_numbers(monkeypatch):
    flash = attention.IMPLEMENTATIONS["flash"]

    def wrong(*operands):
        out_BTNH, lse_BTN = flash.kernel.attention(*operands)
        return out_BTNH.at[0, 3, 1, 2].add(9.0), lse_BTN

    broken = dataclasses.replace(flash, kernel=Kernel(wrong, None))
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "flash", broken)
    message = r"mesh.attention = flash: output at \(0, 3, 1, 2\) is \S+, but it should be \S+; ch"
    with pytest.raises(ValueError, match=message):
        attention.check("flash", CPU)


@pytest.mark.parametrize("name", ["flash", "flash_sm90", "splash", "cudnn"])
def test_a_kernel_that_does_not_run_here_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"mesh.attention = {name} does not run here"):
        attention.check(name, dataclasses.replace(CPU, segments=name != "cudnn"))
