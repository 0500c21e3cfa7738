"""Preference losses equal their formulas in float64 and TRL's own values, however rows are packed.

Gradients of the formulas are by complex steps, as in tests/kernels/test_linear_distill.py.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trl_model
from safetensors.numpy import save_file
from tiny_models import tiny_model, tiny_params

from jaxreason.checkpoint import hf
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.lora import LoraConfig
from jaxreason.objectives.preference import PRESETS, Preference
from jaxreason.parallel import hosts
from jaxreason.parallel.mesh import make_mesh
from jaxreason.train import state as state_lib
from jaxreason.train.step import make_train_step
from jaxreason.types import Batch, Frozen

LENGTH = 24
CASES = {
    **PRESETS,
    "dpo, smooth": Preference(beta=0.5, label_smoothing=0.2),
    "ipo with sft": Preference("ipo", beta=0.3, sft_coef=0.5),
    "orpo with prompts": Preference("orpo", beta=0.2, sft_coef=1.0, sft_prompt=True),
    "simpo, smooth": Preference("simpo", beta=1.5, gamma=0.4, label_smoothing=0.1, sft_coef=0.2),
}


def batch_of(rows: list[list[tuple]], length: int = LENGTH) -> Batch:
    """Rows of pairs (prompt, chosen, rejected) of token ids."""
    out = {name: np.zeros((len(rows), length), np.int32) for name in ("ids", "segments", "at")}
    targets, weights = np.zeros_like(out["ids"]), np.zeros((len(rows), length), np.float32)
    for b, row in enumerate(rows):
        start = 0
        answers = [(pair[0], answer) for pair in row for answer in pair[1:]]
        for segment, (prompt, answer) in enumerate(answers, start=1):
            ids = np.array(prompt + answer)
            here = slice(start, start + len(ids))
            out["ids"][b, here], out["segments"][b, here] = ids, segment
            out["at"][b, here] = np.arange(len(ids))
            targets[b, start : start + len(ids) - 1] = ids[1:]
            weights[b, start + len(prompt) - 1 : start + len(ids) - 1] = 1
            start += len(ids)
    return Batch(
        tokens_BT=out["ids"], targets_BT=targets, weights_BT=weights,
        segments_BT=out["segments"], positions_BT=out["at"],
    )  # fmt: skip


def packings(pairs) -> list[Batch]:
    """The same pairs one a row, two a row, and all but the last in the first row's order."""
    one = [[pair] for pair in pairs]
    two = [pairs[i : i + 2] for i in range(0, len(pairs), 2)]
    return [batch_of(one), batch_of([[], *reversed(two)], 2 * LENGTH)]


# --- the formulas, one pair at a time -------------------------------------------------------------


class Lookup:
    """A stand-in for a model: its parameters are the targets' log-probs themselves."""

    mesh, has_experts = None, False

    def hidden_and_balance(self, params, tokens_BT, segments_BT, positions_BT):
        return None, None

    def logprobs(self, params, h_BTD, targets_BT):
        return params["logp"], None, None


def log_sigmoid(x):
    return -np.log(1 + np.exp(-x))


def pair_loss(case: Preference, chosen, rejected, ref_chosen, ref_rejected):
    """methods.md 2.1 and the papers' definitions, of log-probs [tokens] that may be complex."""
    beta = case.beta
    if case.loss_type == "ipo":
        gap = (chosen - ref_chosen).mean() - (rejected - ref_rejected).mean()
        return (gap - 1 / (2 * beta)) ** 2
    if case.loss_type == "orpo":
        odds = lambda x: np.exp(x.mean()) / (1 - np.exp(x.mean()))
        return -beta * log_sigmoid(np.log(odds(chosen) / odds(rejected)))
    if case.loss_type == "dpo":
        margin = beta * ((chosen - ref_chosen).sum() - (rejected - ref_rejected).sum())
    else:
        margin = beta * (chosen.mean() - rejected.mean()) - case.gamma
    e = case.label_smoothing
    return -(1 - e) * log_sigmoid(margin) - e * log_sigmoid(-margin)


def spans(batch: Batch):
    """(row, prompt's and completion's targets) of each answer of a batch, chosen ones first."""
    found = []
    for b, segments_T in enumerate(batch.segments_BT):
        for segment in range(1, segments_T.max() + 1):
            targets = np.flatnonzero(segments_T == segment)[:-1]
            learnt = batch.weights_BT[b, targets] > 0
            found.append((b, targets, targets[learnt]))
    return found[::2], found[1::2]


def expected(case: Preference, batch: Batch, logp_BT, ref_BT):
    """The whole loss, float64 or complex."""
    chosen, rejected = spans(batch)
    of = lambda grid_BT, span: grid_BT[span[0], span[2]]
    losses = [
        pair_loss(case, of(logp_BT, c), of(logp_BT, r), of(ref_BT, c), of(ref_BT, r))
        for c, r in zip(chosen, rejected)
    ]
    which = 1 if case.sft_prompt else 2
    nll = np.concatenate([-logp_BT[span[0], span[which]] for span in chosen])
    return sum(losses) / len(losses) + case.sft_coef * nll.mean()


def mean_loss(case: Preference, params, frozen, batch: Batch, model=Lookup()):
    """(loss, metrics) as the train step adds them up."""
    weights, loss = case.weights(batch), case.loss(model, params, frozen, batch)
    metrics = {name: x / weights["preference"] for name, x in loss.metrics.items()}
    return sum(c * x / weights[name] for name, (x, c) in loss.terms.items()), metrics


@functools.cache
def compiled(name: str):
    loss = functools.partial(mean_loss, CASES[name])
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def random_logps(batch: Batch, seed: int):
    """Log-probs of every target, and the reference's."""
    random = np.random.default_rng(seed)
    draw = lambda scale: scale * random.normal(size=batch.weights_BT.shape)
    ref_BT = -np.abs(draw(1.0)) - 0.05
    near = lambda x: x.astype(np.float32).astype(np.float64)
    return near(np.minimum(ref_BT + draw(0.3), -0.01)), near(ref_BT)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_equal_the_formulas_in_float64(name):
    case, batch = CASES[name], packings(trl_model.pairs())[1]
    for seed in range(3):
        logp_BT, ref_BT = random_logps(batch, seed)
        frozen = (
            {"reference": {"logp": ref_BT.astype(np.float32)}} if case.needs_reference else None
        )
        params = {"logp": jnp.asarray(logp_BT, jnp.float32)}
        (loss, _), gradient = compiled(name)(params, frozen, batch)
        # float32: sums of up to 20 log-probs of order 1, and IPO's square of them.
        assert float(loss) == pytest.approx(expected(case, batch, logp_BT, ref_BT), rel=1e-5)
        want_BT = np.zeros(logp_BT.shape)
        for at in np.argwhere(batch.segments_BT > 0):
            step = np.zeros(logp_BT.shape, complex)
            step[*at] = 1e-30j
            want_BT[*at] = expected(case, batch, logp_BT + step, ref_BT).imag / 1e-30
        np.testing.assert_allclose(gradient["logp"], want_BT, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["pruning", "ipo with sft", "orpo with prompts", "simpo, smooth"])
def test_packing_changes_nothing(name):
    """One pair a row or two, another order, and a row of padding alone."""
    found = []
    for batch in packings(trl_model.pairs()):
        shape = batch.tokens_BT.shape
        # Of a place's token, its segment's parity and its position: the same wherever it lies.
        seed_BT = 61 * batch.targets_BT + 7 * batch.positions_BT + batch.segments_BT % 2
        draws = -np.abs(np.random.default_rng(0).normal(size=(2, 61 * 61 + 7 * 64))) - 0.05
        logp_BT, ref_BT = (x[seed_BT].reshape(shape).astype(np.float32) for x in draws)
        frozen = {"reference": {"logp": ref_BT}}
        (loss, metrics), gradient = compiled(name)({"logp": jnp.asarray(logp_BT)}, frozen, batch)
        sizes = np.sort(np.abs(gradient["logp"])[batch.weights_BT > 0])
        found.append((loss, metrics, sizes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), *found)


@pytest.mark.parametrize("name", ["dpo", "ipo", "orpo", "simpo"])
def test_an_answer_without_a_partner_has_no_part(name):
    """One pair and two halves, of which the partner is absent or has nothing to learn, are that
    pair alone: the loss, and 0 as the others' gradient."""
    case, pairs = CASES[name], trl_model.pairs()
    batch = batch_of([pairs[:2], pairs[2:]], 2 * LENGTH)
    logp_BT, ref_BT = (x.astype(np.float32) for x in random_logps(batch, 0))
    run = lambda weights_BT: compiled(name)(
        {"logp": jnp.asarray(logp_BT)}, {"reference": {"logp": ref_BT}},
        dataclasses.replace(batch, weights_BT=weights_BT),
    )  # fmt: skip
    row, segments_BT = np.array([[0], [1]]), batch.segments_BT
    pair_BT = (row == 0) & (segments_BT <= 2)
    halves_BT = ((row == 0) & (segments_BT == 3)) | ((row == 1) & (segments_BT == 2))
    (want, _), want_gradient = run(batch.weights_BT * pair_BT)
    weights_BT = (batch.weights_BT * (pair_BT | halves_BT)).astype(np.float32)
    (got, _), gradient = run(weights_BT)
    assert case.weights(dataclasses.replace(batch, weights_BT=weights_BT))["preference"] == 1
    assert float(got) == float(want)
    np.testing.assert_array_equal(gradient["logp"], want_gradient["logp"])
    assert (np.asarray(gradient["logp"])[~pair_BT] == 0).all() and np.isfinite(want)


@pytest.mark.parametrize("name", ["dpo", "orpo"])
def test_a_batch_without_pairs_is_zero_and_so_is_its_gradient(name):
    """A microbatch may be padding alone: 0 * NaN is NaN, also of a gradient."""
    case, batch = CASES[name], batch_of([[]])
    zeros = {"logp": jnp.zeros(batch.tokens_BT.shape)}

    def total(params):
        loss = case.loss(Lookup(), params, {"reference": zeros}, batch)
        return sum(c * x for x, c in loss.terms.values())

    loss, gradient = jax.jit(jax.value_and_grad(total))(zeros)
    assert loss == 0 and (gradient["logp"] == 0).all()


# --- TRL ------------------------------------------------------------------------------------------

TRL = json.loads(pathlib.Path(__file__).with_name("trl_values.json").read_text())


def as_trl_says(settings: dict, name: str) -> Preference:
    if name.startswith("orpo"):
        return Preference("orpo", sft_coef=1.0, sft_prompt=True, **settings)
    if name.startswith("simpo"):
        ours = {"beta": "beta", "simpo_gamma": "gamma", "cpo_alpha": "sft_coef"}
        ours["label_smoothing"] = "label_smoothing"
        return Preference("simpo", **{ours[key]: value for key, value in settings.items()})
    kinds = dict(zip(settings["loss_type"], settings["loss_weights"]))
    return Preference(name.split()[0], beta=settings["beta"], sft_coef=kinds.get("sft", 0.0))


@pytest.fixture(scope="module")
def trl_models(tmp_path_factory):
    """(the model, the policy's parameters, the reference's), by way of Hugging Face's format."""
    found = []
    for seed in (trl_model.POLICY, trl_model.REFERENCE):
        folder = tmp_path_factory.mktemp("hf")
        (folder / "config.json").write_text(json.dumps(trl_model.CONFIG))
        save_file(trl_model.weights(seed), folder / "model.safetensors")
        config, params = hf.import_hf(folder)
        found.append(jax.tree.map(jnp.asarray, params))
    return LanguageModel(config, tiny_model().execution), *found


@pytest.mark.parametrize("name", TRL["cases"])
def test_trl_gives_the_same(name, trl_models):
    """Loss, metrics and gradient norm within 1e-5 of what TRL printed; two pairs a row here."""
    model, policy, reference = trl_models
    want = TRL["cases"][name]
    case, batch = as_trl_says(want["settings"], name), packings(trl_model.pairs())[1]
    loss = functools.partial(mean_loss, case, model=model)
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, metrics), gradients = run(policy, {"reference": reference}, batch)
    assert float(total) == pytest.approx(want["loss"], rel=1e-5)
    assert float(optax.tree.norm(gradients)) == pytest.approx(want["grad_norm"], rel=1e-5)
    assert set(metrics) == set(want["metrics"])
    for key, value in want["metrics"].items():
        assert float(metrics[key]) == pytest.approx(value, rel=1e-5, abs=1e-5), key


def test_the_trl_cases_are_all_losses():
    assert {name.split()[0].strip(",") for name in TRL["cases"]} == {"dpo", "ipo", "orpo", "simpo"}


# --- the train step -------------------------------------------------------------------------------


@pytest.mark.slow
def test_microbatches_and_eight_devices_change_nothing():
    """Loss, gradient norm and metrics of a step, the reference in `frozen`: 2 microbatches of 4
    rows on 4 x 2 devices."""
    pairs = trl_model.pairs()
    batch = batch_of([[pairs[i % 4]] for i in (0, 1, 2, 3, 1, 0, 3, 2)])
    case = PRESETS["pruning"]

    def one_step(mesh, microbatches=1):
        model = tiny_model(mesh)
        optimizer = optax.sgd(1.0)
        step = make_train_step(model, case, optimizer, lambda s: 1e-3, microbatches=microbatches)
        state = state_lib.create(model, optimizer, jax.random.key(0), tiny_params())
        reference = jax.tree.map(lambda x: 0.9 * x, tiny_params())
        if mesh is not None:
            reference = jax.device_put(reference, model.shardings())
        rows = batch if mesh is None else hosts.to_global(mesh, batch)
        return step(state, rows, Frozen(read={"reference": reference}))[1]

    want = one_step(None)
    assert want["num_tokens"] == batch.weights_BT.sum() and want["grad_norm"] > 0.1
    assert 0 < want["rewards/accuracies"] < 1
    got = one_step(make_mesh({"fsdp": 4, "tensor": 2}), 2)
    for name in want:  # float32 sums in another order
        assert float(got[name]) == pytest.approx(float(want[name]), rel=2e-5, abs=1e-6), name


def test_adapters_that_add_nothing_yet_are_the_reference():
    """With LoRA `frozen` holds the base that the adapters change and, beside it, the reference."""
    model = tiny_model().adapted(LoraConfig(rank=2))
    adapters, base = jax.jit(model.init)(jax.random.key(1)), tiny_params()
    frozen = {**base, "reference": base}
    batch = packings(trl_model.pairs())[0]

    @jax.jit
    def run(adapters, frozen):
        return mean_loss(PRESETS["dpo"], model.complete(adapters, frozen), frozen, batch, model)

    loss, metrics = run(adapters, frozen)
    assert float(loss) == pytest.approx(np.log(2), rel=1e-6)
    # beta times the difference of sums of some tens, which two programs may round apart by an ulp.
    assert abs(float(metrics["rewards/margins"])) < 1e-6 and metrics["logps/chosen"] < -1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(loss_type="kto"), "loss_type is 'kto'; it must be one of dpo, ipo, orpo, simpo"),
        (dict(beta=0.0), "beta is 0.0; it must be above 0"),
        (dict(label_smoothing=0.5), r"label_smoothing is 0.5; it must be in \[0, 0.5\)"),
        (dict(loss_type="orpo", label_smoothing=0.1), "label_smoothing is 0.1; orpo has none"),
        (dict(gamma=1.0), "gamma is 1.0; dpo has none"),
        (dict(loss_type="simpo", gamma=-1.0), "gamma is -1.0; it must be 0 or more"),
        (dict(sft_coef=-1.0), "sft_coef is -1.0; it must be 0 or more"),
        (dict(sft_prompt=True), "sft_prompt is True; it needs train.preference.sft_coef above 0"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=rf"^train\.preference\.{message}$"):
        Preference(**options)
