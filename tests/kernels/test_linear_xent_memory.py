"""What the head's losses take, compiled at the size of a real batch and run nowhere.

`pytest -s` prints the numbers.
"""

import functools
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest

from jaxreason.kernels import linear_distill, linear_xent
from jaxreason.model.config import PRESETS
from jaxreason.parallel import chips

V, D = 151_936, 2048  # of qwen3-1.5b and 1.7b
ROWS = (8192, 16_384, 32_768)
TEACHER = 4096  # of qwen3-8b, which has the same vocabulary
absent = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="compiling for a GPU that is not here needs the CUDA plugin: pip install .[cuda]",
)
GPUS = [pytest.param(c, marks=[pytest.mark.hardware_free, absent]) for c in ("b200", "h200")]


def log_softmax(h_TD, w_VD):
    """As whoever has no kernel writes it."""
    w_VD = w_VD.astype(h_TD.dtype)
    return jax.nn.log_softmax(jnp.einsum("TD,VD->TV", h_TD, w_VD, preferred_element_type="float32"))


def picked(logp_TV, targets_T):
    return jnp.take_along_axis(logp_TV, targets_T[:, None], 1)[:, 0]


def plain_xent(h, w, targets, weights, teacher_h, teacher_w):
    return -(weights * picked(log_softmax(h, w), targets)).sum()


def plain_logprobs(h, w, targets, weights, teacher_h, teacher_w):
    logp_TV = log_softmax(h, w)
    entropy_T = -(jnp.exp(logp_TV) * logp_TV).sum(-1)
    return (weights * (picked(logp_TV, targets) + entropy_T)).sum()


def plain_kl(h, w, targets, weights, teacher_h, teacher_w):
    log_p_TV, log_q_TV = log_softmax(teacher_h, teacher_w), log_softmax(h, w)
    return (weights * (jnp.exp(log_p_TV) * (log_p_TV - log_q_TV)).sum(-1)).sum()


def xent(h, w, targets, weights, teacher_h, teacher_w):
    return linear_xent.linear_xent(h, w, targets, weights)[0]


def logprobs(h, w, targets, weights, teacher_h, teacher_w):
    logp_T, entropy_T, _ = linear_xent.linear_logprobs(h, w, targets)
    return (weights * (logp_T + entropy_T)).sum()


def distill(h, w, targets, weights, teacher_h, teacher_w, **mix):
    of_teacher, mix = (teacher_h, teacher_w), linear_distill.Mix(**mix)
    return linear_distill.linear_distill(h, w, *of_teacher, targets, weights, mix)[0]


kl = distill
jsd = functools.partial(distill, beta=0.5, nll_coef=0.5)


def plain_jsd(h, w, targets, weights, teacher_h, teacher_w):
    log_p_TV, log_q_TV = log_softmax(teacher_h, teacher_w), log_softmax(h, w)
    log_m_TV = jnp.logaddexp(log_p_TV, log_q_TV) - math.log(2)
    kl_TV = jnp.exp(log_p_TV) * (log_p_TV - log_m_TV) + jnp.exp(log_q_TV) * (log_q_TV - log_m_TV)
    return (weights * (kl_TV.sum(-1) - picked(log_q_TV, targets))).sum() / 2


def stored(targets, weights):
    """Some 64 ids a row and log-probs of them."""
    ids_TK = (targets[:, None] + jnp.arange(64)) % V
    return ids_TK, jnp.broadcast_to(-5 - weights[:, None], ids_TK.shape).astype(jnp.bfloat16)


def topk(h, w, targets, weights, teacher_h, teacher_w):
    known = stored(targets, weights)
    return linear_distill.linear_topk_distill(h, w, *known, targets, weights)[0]


def plain_topk(h, w, targets, weights, teacher_h, teacher_w):
    ids_TK, log_p_TK = stored(targets, weights)
    p_TK = jnp.exp(log_p_TK.astype(jnp.float32))
    q_TK = jnp.exp(jnp.take_along_axis(log_softmax(h, w), ids_TK, 1))
    p_tail, q_tail = 1 - p_TK.sum(-1), 1 - q_TK.sum(-1)
    kl_T = (p_TK * jnp.log(p_TK / q_TK)).sum(-1) + p_tail * jnp.log(p_tail / q_tail)
    return (weights * kl_T).sum()


LOSSES = {
    "xent": (xent, plain_xent),
    "logprobs": (logprobs, plain_logprobs),
    "kl": (kl, plain_kl),
    "jsd": (jsd, plain_jsd),
    "topk": (topk, plain_topk),
}


def compiled(loss, chip: str, rows: int, vocab: int, dim: int, gradients: bool = True):
    """For one device: bf16 and a float32 head on a GPU, float32 here."""
    device = jax.devices()[0] if chip == "cpu" else chips.absent_gpus(chip, 1, 1)[0]
    place = jax.sharding.SingleDeviceSharding(device)
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    dtype = jnp.float32 if chip == "cpu" else jnp.bfloat16
    student = of(dtype, rows, dim), of(jnp.float32, vocab, dim)
    teacher = of(dtype, rows, TEACHER), of(jnp.float32, vocab, TEACHER)
    operands = (*student, of(jnp.int32, rows), of(jnp.float32, rows), *teacher)
    run = jax.value_and_grad(loss, (0, 1)) if gradients else loss
    return jax.jit(run).lower(*operands).compile()


@functools.cache
def temp(loss, chip: str, rows: int) -> int:
    """Bytes of the loss with its gradients."""
    return compiled(loss, chip, rows, V, D).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("chip", ["cpu", *GPUS])
@pytest.mark.parametrize("name", LOSSES)
def test_a_sixth_of_what_logits_take_and_no_more_for_more_rows(name, chip):
    """At most 1/6 of the plain version's at 16,384 rows; over three sizes the plain one grows by
    8 bytes or more a logit, ours by a few numbers of a row's hidden state."""
    ours, plain = LOSSES[name]
    taken, logits = [temp(ours, chip, rows) for rows in ROWS], temp(plain, chip, ROWS[1])
    print(
        f"\n{name} on {chip}, V = {V}, D = {D}: {logits / 1e9:.2f} GB plain at T = {ROWS[1]}, ours "
        + ", ".join(f"{t / 1e9:.2f} GB at T = {rows}" for rows, t in zip(ROWS, taken))
        + f"; {logits / taken[1]:.1f} times less"
    )
    assert logits > 8 * ROWS[1] * V
    assert taken[1] <= logits / 6
    for few, many, less, more in zip(ROWS, ROWS[1:], taken, taken[1:]):
        assert more - less < 4 * 4 * (many - few) * (D + TEACHER)


@pytest.mark.parametrize("chip", ["cpu", *GPUS])
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_other_divergences_take_no_more(beta, chip):
    other = temp(functools.partial(kl, beta=beta), chip, ROWS[1])
    print(f"\nkl, beta {beta}, on {chip}: {other / 1e9:.2f} GB")
    assert other <= temp(plain_kl, chip, ROWS[1]) / 6


# The ends of what PRESETS have, in both dims, and the main size: the narrowest model, with nearly
# the largest vocabulary; the largest, over a width that is no power of two; the widest.
SHAPES = [(640, 262_144), (2048, 151_936), (5376, 262_208), (16_384, 128_256)]


def test_the_shapes_are_the_ends_of_the_presets():
    of_presets = {(c.embed_dim, c.vocab_size) for c in PRESETS.values()} - {(128, 320), (320, 8192)}
    assert set(SHAPES) <= of_presets
    for ends in (min, max):
        assert ends(SHAPES)[0] == ends(of_presets)[0]
        assert ends(v for _, v in SHAPES) == ends(v for _, v in of_presets)


@pytest.mark.hardware_free
@absent
@pytest.mark.parametrize("chip", ["b200", "h200"])
@pytest.mark.parametrize("dim, vocab", SHAPES)
def test_every_function_compiles_for_absent_gpus(dim, vocab, chip):
    """Loss, log-probs with entropy and KL, forward alone and with their gradients, bf16: and no
    array is as large as the logits of all rows."""

    def every(*operands):
        return tuple(loss(*operands) for loss, _ in LOSSES.values())

    def total(*operands):
        return sum(every(*operands))

    rows = max(16_384, 2 * dim)  # more than the head has columns: it is an array, too
    forward = compiled(every, chip, rows, vocab, dim, gradients=False)
    backward = compiled(total, chip, rows, vocab, dim)
    for program in (forward, backward):
        memory = program.memory_analysis()
        total_bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        assert total_bytes < chips.CHIPS[chip].memory
        assert largest(program.as_text()) < rows * vocab


def largest(text: str) -> int:
    """Elements of the largest array of a program."""
    return max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", text))
