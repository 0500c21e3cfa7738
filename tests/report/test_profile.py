"""run.profile.steps: which steps are traced, and the table of where their time goes."""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from test_mistakes import CONFIG, LINES

from jaxreason import launch
from jaxreason.report import profile
from jaxreason.train.trace import Trace, check_steps


@pytest.mark.parametrize(
    "name, kind",
    [
        # kernels of H100 and H200 traces
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNN", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "matmul"),
        ("gemm_fusion_dot_general.9", "matmul"),
        ("cublas-lt-matmul.3", "matmul"),
        (
            "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3i",
            "attention",
        ),
        ("flash_of_keys", "attention"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("reduce-scatter-start.1", "collectives"),
        ("MemcpyD2D", "copies and transposes"),
        ("input_transpose_fusion.2", "copies and transposes"),
        ("loop_dynamic_update_slice_fusion.14", "copies and transposes"),
        ("wrapped_concatenate", "copies and transposes"),
        ("input_add_reduce_fusion.1", "elementwise and reductions"),
        ("loop_select_fusion.3", "elementwise and reductions"),
        # instructions of TPU and CPU traces
        ("all-gather.12", "collectives"),
        ("all-reduce-scatter.3", "collectives"),
        ("splash_mha_fwd_residuals.1", "attention"),
        ("convolution_add_fusion.7", "matmul"),
        ("dot.5", "matmul"),
        ("multiply_add_fusion", "elementwise and reductions"),
        ("copy.3", "copies and transposes"),
        ("grouped_product", "other Pallas kernels"),
    ],
)
def test_a_name_says_what_kind_of_work_it_is(name, kind):
    assert profile.kind_of_name(name) == kind


def test_a_program_says_more_than_names():
    """A fusion with a product inside, and one of the optimizer's scope, whatever their names."""

    @jax.jit
    def step(x, w, m):
        gradient = jax.grad(lambda w: jnp.tanh(x @ w).sum())(w)
        with jax.named_scope(profile.OPTIMIZER_SCOPE):
            m = 0.9 * m + gradient
            return w - m, m

    x = jnp.ones((64, 64))
    kinds = profile.kinds_of_program(step.lower(x, x, x).compile().as_text())
    assert {"matmul", "optimizer"} <= set(kinds.values())


def test_an_instant_is_counted_once():
    """A loop is not its body; what computes shares; a collective has what is left."""
    compute = [(0.0, 10.0, "while.1", "m"), (1.0, 3.0, "dot.1", "m"), (4.0, 6.0, "add.1", "m")]
    other = [(2.0, 5.0, "all-gather.1", "m"), (5.0, 7.0, "dot.2", "m"), (10.0, 12.0, "copy.1", "m")]
    found = {}
    for seconds, name, _ in profile._shares([compute, other], lambda n, _: profile.kind_of_name(n)):
        found[name] = found.get(name, 0.0) + seconds
    assert found == pytest.approx(
        {"while.1": 1 + 1 + 0.5 + 3, "dot.1": 2, "add.1": 1 + 0.5, "dot.2": 0.5 + 0.5, "copy.1": 2}
    )
    assert sum(found.values()) == pytest.approx(12)


@pytest.mark.parametrize("steps", [(0, 1), (3, 2), (2, 5), (1, 2, 3), (1.0, 2), (3,)])
def test_steps_that_a_stage_does_not_have_are_refused(steps):
    with pytest.raises(ValueError, match=r"run.profile.steps is .*1 <= first <= last <= .* = 4"):
        check_steps(steps, 4)


def test_a_loop_that_ends_early_ends_its_trace(tmp_path):
    """Stopped after two of five steps: the table is of those, and another trace can begin."""
    said, step = [], jax.jit(lambda x, *_: x @ x)
    x = jnp.ones((256, 256))
    for first in (1, 2):
        with Trace((first, 5), str(tmp_path), said.append) as trace:
            run = trace.watched(step)
            for done in range(3):
                trace.before(done, x)
                x = run(x)
                trace.after(done + 1, x)
        assert json.loads((tmp_path / "where_time_goes.json").read_text())["steps"] == [first, 3]
    assert "where time goes, steps 1 to 3" in said[0]


@pytest.fixture
def place(tmp_path, monkeypatch) -> pathlib.Path:
    (tmp_path / "tiny.py").write_text(CONFIG)
    (tmp_path / "pairs.jsonl").write_text("\n".join(LINES) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_says_where_its_time_goes(place, capsys):
    flags = ["--config=tiny.py", "--workdir=run", "--config.train.steps=4"]
    assert launch.main([*flags, "--config.run.profile.steps=(2, 3)"]) == 0
    (path,) = (place / "run").glob("profile/*/where_time_goes.json")
    found = json.loads(path.read_text())
    kinds = found["kinds"]
    assert found["steps"] == [2, 3] and set(kinds) == {*profile.KINDS, "waiting"}
    assert kinds["matmul"] > 0 and kinds["optimizer"] > 0
    assert sum(kinds.values()) == pytest.approx(found["step_seconds"])
    assert 0 < sum(kinds.values()) - kinds["waiting"] <= found["step_seconds"]
    seconds = [op["seconds"] for op in found["ops"]]
    assert len(seconds) == 10 and seconds == sorted(seconds, reverse=True)
    said = capsys.readouterr().out
    assert "where time goes, steps 2 to 3" in said and "matmul" in said


def test_a_run_refuses_steps_that_it_does_not_have(place, capsys):
    flags = ["--config=tiny.py", "--workdir=run", "--config.run.profile.steps=(2, 3)"]
    assert launch.main(flags) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "run.profile.steps is (2, 3)" in said[0] and "= 2" in said[0]
