"""Which attention decodes: what each implementation can do, what `auto` takes, what is refused."""

import dataclasses

import pytest
from tiny_models import tiny_model

from jaxreason.model import decode_choice
from jaxreason.model.decode_choice import Use, choose
from jaxreason.model.execution import Execution

FP8 = "float8_e4m3fn"
H200 = Use(platform="cuda", dtype="bfloat16", cache_dtype="bfloat16", head_dim=128)
TPU = dataclasses.replace(H200, platform="tpu")
CPU = Use(platform="cpu", dtype="float32", cache_dtype="float32", head_dim=8)


def with_fp8(use: Use) -> Use:
    return dataclasses.replace(use, cache_dtype=FP8)


@pytest.mark.parametrize("use", [CPU, TPU, H200, dataclasses.replace(H200, head_dim=512)])
def test_auto_takes_what_is_able_and_has_run(use):
    assert choose("auto", use) == choose("xla", use) == "xla"


@pytest.mark.parametrize("use", [H200, with_fp8(H200)])
def test_a_kernel_that_has_not_run_on_its_chip_is_taken_by_name(use):
    assert choose("pallas", use) == "pallas"


NO_FP8 = f"xla: reads a cache of bfloat16, not {FP8}"


@pytest.mark.parametrize(
    "name, use, says",
    [
        ("pallas", CPU, ["pallas: runs on gpu, not cpu", "set mesh.decode_attention = xla"]),
        ("pallas", dataclasses.replace(H200, head_dim=512), ["head_dim is at most 256, not 512"]),
        ("xla", with_fp8(H200), [NO_FP8, "set mesh.decode_attention = pallas"]),
        ("auto", with_fp8(H200),
         [NO_FP8, "pallas: is taken only by name, as it has not run on a chip of ours",
          "set mesh.decode_attention = pallas"]),
        ("auto", with_fp8(TPU),
         [NO_FP8, "pallas: runs on gpu, not tpu", "set mesh.kv_cache_dtype = auto"]),
        ("pallas", with_fp8(CPU),
         [f"xla: reads a cache of float32, not {FP8}", "pallas: runs on gpu, not cpu",
          "set mesh.kv_cache_dtype = auto"]),
    ],
)  # fmt: skip
def test_what_is_refused_has_every_implementation_s_reason(name, use, says):
    with pytest.raises(ValueError, match=f"mesh.decode_attention is '{name}'") as refused:
        choose(name, use)
    for part in says:
        assert part in str(refused.value)


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="is 'palas'; known implementations: auto, pallas, xla"):
        choose("palas", CPU)
    with pytest.raises(ValueError, match=r"mesh.kv_cache_dtype is 'fp8'; it must be auto or fp8_"):
        Execution(kv_cache_dtype="fp8")


def test_a_model_is_refused_when_it_is_built():
    """Before anything is traced for a device."""
    with pytest.raises(ValueError, match="pallas: runs on gpu, not cpu; xla: reads a cache of fl"):
        tiny_model(execution=Execution(kv_cache_dtype="fp8_e4m3"))
    with pytest.raises(ValueError, match="pallas: runs on gpu, not cpu"):
        tiny_model(execution=Execution(decode_attention="pallas"))


@pytest.mark.usefixtures("simulated_kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cache_dtype", ["its own", FP8])
@pytest.mark.parametrize("window", [False, True])
def test_a_kernel_is_held_against_the_reference(dtype, cache_dtype, window):
    cache_dtype = dtype if cache_dtype == "its own" else cache_dtype
    use = dict(dtype=dtype, cache_dtype=cache_dtype, window=window)
    decode_choice.check("pallas", dataclasses.replace(CPU, **use))


@pytest.mark.usefixtures("simulated_kernels")
@pytest.mark.parametrize("part", ["output", "output with a shared prefix"])
def test_a_kernel_that_is_wrong_is_refused_with_both_numbers(monkeypatch, part):
    right = decode_choice.IMPLEMENTATIONS["pallas"]

    def wrong(*operands, prefix=None, **options):
        out_BNH = right.kernel(*operands, prefix=prefix, **options)
        return out_BNH.at[2, 1, 3].add(9.0) if ("prefix" in part) == bool(prefix) else out_BNH

    broken = dataclasses.replace(right, kernel=wrong)
    monkeypatch.setitem(decode_choice.IMPLEMENTATIONS, "pallas", broken)
    message = rf"mesh.decode_attention = pallas: {part} at \(2, 1, 3\) is \S+, but it should be \S+"
    with pytest.raises(ValueError, match=message):
        decode_choice.check("pallas", CPU)


@pytest.mark.usefixtures("simulated_kernels")
@pytest.mark.parametrize("fault", ["length", "window"])
def test_a_kernel_that_reads_the_wrong_keys_is_refused(monkeypatch, fault):
    right = decode_choice.IMPLEMENTATIONS["pallas"]

    def wrong(q_BNH, k_BKSH, v_BKSH, lengths_B, *, window=None, **options):
        lengths_B = lengths_B - (fault == "length")
        window = None if fault == "window" else window
        return right.kernel(q_BNH, k_BKSH, v_BKSH, lengths_B, window=window, **options)

    broken = dataclasses.replace(right, kernel=wrong)
    monkeypatch.setitem(decode_choice.IMPLEMENTATIONS, "pallas", broken)
    with pytest.raises(ValueError, match=r"mesh.decode_attention = pallas: output at .* should b"):
        decode_choice.check("pallas", dataclasses.replace(CPU, window=True))


def test_a_kernel_that_does_not_run_here_is_refused_by_name():
    with pytest.raises(ValueError, match=r"mesh.decode_attention = pallas does not run here"):
        decode_choice.check("pallas", CPU)
