"""A checkpoint that has learnt nothing, where a stage needs one and not what it knows."""

import pathlib

import jax
import pytest

from jaxreason.checkpoint import hf
from jaxreason.model.config import preset
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.execution import Execution
from jaxreason.text import chat
from jaxreason.text.tokenizer import ByteTokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    """A Hugging Face directory of random parameters that reads bytes, with Qwen3's template."""
    folder, tokenizer = tmp_path_factory.mktemp("checkpoint") / "tiny", ByteTokenizer()
    shape = preset("qwen3-tiny", vocab_size=261, num_layers=1, embed_dim=32, mlp_dim=32)
    model = LanguageModel(shape, Execution(), None, valid_vocab=261)
    template = chat.template_for("qwen3", tokenizer).jinja
    save = lambda path: tokenizer.save(path, chat_template=template)
    params = model.init(jax.random.key(0))
    ends = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    hf.export_hf(folder, shape, params, generation=ends, save_tokenizer=save)
    return folder
