"""Evaluation sets: what they refuse; held-out text on a mesh has the numbers of one device."""

import json

import jax
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tiny_models import tiny_model

from jaxreason.data.arithmetic import ArithmeticConfig, prepare_arithmetic
from jaxreason.parallel.mesh import make_mesh
from jaxreason.recipes import defaults, evaluation
from jaxreason.recipes.workdir import Workdir
from jaxreason.text.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def measured(path, mesh, params=None):
    """What a tiny model scores on 30 lines, and its parameters: by default random ones."""
    lines = [{"text": f"{n} and {n * n} are a number and its square. " * 3} for n in range(30)]
    (path / "squares.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = defaults.default_config("tiny", "fit")
    config.chat.template = "plain"
    config.eval.sets = {
        "squares": defaults.text_eval(str(path / "squares.jsonl"), rows=4, length=64)
    }
    model = tiny_model(mesh, valid_vocab=BYTES.vocab_size, vocab_size=264)
    if params is None:
        params = jax.jit(model.init)(jax.random.key(0))
    else:
        params = jax.device_put(params, model.shardings())
    values = evaluation.build(config, Workdir(path), BYTES, model).validate(params)
    return values, jax.device_get(params)


@pytest.mark.parametrize("shape", [{"fsdp": 2, "tensor": 2}, {"data": 2, "context": 2}], ids=str)
def test_text_has_the_loss_of_one_device_on_a_mesh(tmp_path, shape):
    want, params = measured(tmp_path, None)
    got, _ = measured(tmp_path, make_mesh(shape, jax.devices()[:4]), params)
    assert want["eval/squares/tokens"] == got["eval/squares/tokens"] > 1000
    for name in want:  # sums in another order
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["arithmetic", "jsonl", "parquet"])
@pytest.mark.parametrize(
    "template, says",
    [
        ("{nothing}=", "nothing"),
        ("What is it?", r"eval\.sets\.asked\.prompt_template is 'What is it\?'; it must be text"),
        ("{question", r"prompt_template is '{question'; it must be text with one or more record"),
    ],
)
def test_a_template_names_fields_that_there_are(tmp_path, kind, template, says):
    records = [{"question": "2+3", "answer": "5"}, {"question": "2+4", "answer": "6"}]
    file, options = tmp_path / f"asked.{kind}", dict(prompt_template=template, max_tokens=4)
    if kind == "arithmetic":
        small = ArithmeticConfig(min_operations=1, max_operations=1, num_train=8, num_test=2)
        prepare_arithmetic(small, tmp_path / "data/arithmetic")
        asked = defaults.arithmetic_eval(**options)
    else:
        if kind == "jsonl":
            file.write_text("\n".join(map(json.dumps, records)))
        else:
            parquet.write_table(pa.Table.from_pylist(records), file)
        asked = defaults.jsonl_eval(str(file), answer_field="answer", **options)
    config = defaults.default_config("tiny", "fit")
    config.chat.template, config.eval.sets = "plain", {"asked": asked}
    model = tiny_model(valid_vocab=BYTES.vocab_size, vocab_size=264)
    with pytest.raises(ValueError, match=says) as error:
        evaluation.build(config, Workdir(tmp_path), BYTES, model)
    assert "\n" not in str(error.value) and "eval.sets.asked" in str(error.value)
