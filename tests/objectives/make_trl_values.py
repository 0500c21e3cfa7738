"""Writes trl_values.json: what TRL's own trainers compute on the model and pairs of trl_model.py.

The methods that compute the losses are those of DPOTrainer, ORPOTrainer and CPOTrainer; of the
trainers themselves only the attributes that these methods read are made. The versions are in the
file. In an environment of its own, for this package does not need TRL:

    python3.11 -m venv /tmp/envs/trl
    /tmp/envs/trl/bin/pip install torch==2.13.0 transformers trl
    /tmp/envs/trl/bin/python tests/objectives/make_trl_values.py
"""

import collections
import json
import pathlib
import types

import accelerate
import torch
import transformers
import trl
import trl_model
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

PAD = trl_model.CONFIG["pad_token_id"]
ACCELERATOR = accelerate.Accelerator(cpu=True)
_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")  # as the trainer asks for them


def model(seed: int):
    settings = {k: v for k, v in trl_model.CONFIG.items() if k not in ("model_type", "torch_dtype")}
    config = transformers.Qwen3Config(**settings)
    found = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = {name: torch.from_numpy(x) for name, x in trl_model.weights(seed).items()}
    missing, unexpected = found.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    found.tie_weights()
    return found.train()


def bare(trainer_class, **attributes):
    """A trainer of which nothing is set up but what the loss reads."""
    trainer = trainer_class.__new__(trainer_class)
    trainer.accelerator, trainer.aux_loss_enabled = ACCELERATOR, False
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def dpo(policy, beta: float, loss_type: list[str], loss_weights: list[float]):
    trainer = bare(
        DPOTrainer, model=policy, ref_model=model(trl_model.REFERENCE), beta=beta,
        loss_types=loss_type, loss_weights=loss_weights, label_smoothing=0.0, ld_alpha=None,
        f_divergence_type="reverse_kl", precompute_ref_logps=False, use_weighting=False,
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None), _total_train_tokens=0,
        _tp_size=1, _metrics={"train": collections.defaultdict(list)},
    )  # fmt: skip
    add_fused_lm_head(policy, outputs=_OUTPUTS)
    add_fused_lm_head(trainer.ref_model)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, pair)) for pair in trl_model.pairs()]
    loss = trainer._compute_loss(policy, DataCollatorForPreference(pad_token_id=PAD)(rows), False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def padded(rows: list[list[int]], value: int):
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def preference_batch():
    """As ORPO's and CPO's collator makes it: labels are -100 on prompts and padding."""
    batch = {}
    for answer, of in (("chosen", 1), ("rejected", 2)):
        ids = [pair[0] + pair[of] for pair in trl_model.pairs()]
        labels = [[-100] * len(pair[0]) + pair[of] for pair in trl_model.pairs()]
        batch[f"{answer}_input_ids"] = padded(ids, PAD)
        batch[f"{answer}_attention_mask"] = padded([[1] * len(row) for row in ids], 0)
        batch[f"{answer}_labels"] = padded(labels, -100)
    return batch


def orpo(policy, beta: float):
    trainer = bare(ORPOTrainer, beta=beta, is_encoder_decoder=False, padding_value=PAD)
    return trainer.get_batch_loss_metrics(policy, preference_batch())


def simpo(policy, beta: float, simpo_gamma: float, label_smoothing: float, cpo_alpha: float):
    trainer = bare(
        CPOTrainer, beta=beta, loss_type="simpo", simpo_gamma=simpo_gamma, alpha=0.0,
        label_smoothing=label_smoothing, cpo_alpha=cpo_alpha, is_encoder_decoder=False,
        pad_token_id=PAD,
    )  # fmt: skip
    return trainer.get_batch_loss_metrics(policy, preference_batch())


CASES = {
    "dpo": (dpo, dict(beta=0.1, loss_type=["sigmoid"], loss_weights=[1.0])),
    "dpo with sft": (dpo, dict(beta=0.3, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3])),
    "ipo": (dpo, dict(beta=0.2, loss_type=["ipo"], loss_weights=[1.0])),
    "orpo": (orpo, dict(beta=0.1)),
    "simpo": (simpo, dict(beta=2.0, simpo_gamma=1.0, label_smoothing=0.0, cpo_alpha=0.0)),
    "simpo, smooth, with nll": (
        simpo,
        dict(beta=1.5, simpo_gamma=0.6, label_smoothing=0.1, cpo_alpha=0.5),
    ),
}


def main():
    names = ("torch", "transformers", "trl")
    values = {"versions": {n: m.__version__ for n, m in zip(names, (torch, transformers, trl))}}
    values["cases"] = {}
    for name, (run, settings) in CASES.items():
        policy = model(trl_model.POLICY)
        loss, metrics = run(policy, **settings)
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in policy.parameters()))
        kept = {k: v for k, v in metrics.items() if k.startswith(("rewards/", "logps/"))}
        found = {"loss": loss.item(), "grad_norm": norm.item(), "metrics": kept}
        values["cases"][name] = {"settings": settings, **found}
        print(name, found)
    path = pathlib.Path(__file__).with_name("trl_values.json")
    path.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
