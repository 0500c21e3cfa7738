"""Which attention runs: what each implementation can do, what `auto` takes, what is refused."""

import dataclasses

import pytest
from simulated_kernels import RUN_HERE

from jaxreason.kernels.ring import Kernel
from jaxreason.model import attention
from jaxreason.model.attention import Use, choose

H200 = Use(platform="cuda", dtype="bfloat16", head_dim=128)
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
    assert choose("flash", H200) == "flash"
    assert choose("splash", TPU) == "splash"


@pytest.mark.parametrize(
    "name, use, reasons",
    [
        ("cudnn", H200, ["cudnn: cannot keep packed documents apart", "use flash or blockwise"]),
        ("flash", dataclasses.replace(H200, head_dim=512),
         ["flash: head_dim is at most 256, not 512", "splash: runs on tpu, not cuda"]),
        ("flash", TPU, ["flash: runs on gpu, not tpu", "use splash or blockwise"]),
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


@pytest.mark.parametrize("name", ["flash", "splash", "cudnn"])
def test_a_kernel_that_does_not_run_here_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"mesh.attention = {name} does not run here"):
        attention.check(name, dataclasses.replace(CPU, segments=name != "cudnn"))
