"""`config.chat`: where a run's template comes from, what ends its turns, its tags and its day."""

import datetime
import json

import jax
import pytest

from jaxreason import launch
from jaxreason.recipes import assemble, checkpoints, defaults, evaluation, pipeline
from jaxreason.recipes.workdir import Workdir
from jaxreason.rewards.mix import RewardConfig
from jaxreason.rollout.generate import build_generate
from jaxreason.text import chat
from jaxreason.text.tokenizer import ByteTokenizer, load_tokenizer
from jaxreason.types import Completion, Sampling
from tests.tiny_models import tiny_model, tiny_params

OWN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{{ '<|im_end|>' if m.role == 'assistant' else '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def published(tmp_path):
    """A Hugging Face folder of bytes with its own template; <|endoftext|> ends its documents."""
    folder = tmp_path / "published"
    ByteTokenizer().save(folder, OWN)
    (folder / "jaxreason_tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 257]}))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    return folder


def config_of(folder, **changes):
    c = defaults.default_config("x", "fit")
    c.init = {"from": str(folder)}
    c.tokenizer.update(kind="hf", path=str(folder))  # there are no weights to check it by
    c.chat.template = "checkpoint"
    for key, value in changes.items():
        c.chat[key] = value
    return c


def test_a_checkpoints_own_template_is_used_and_written_back(published, tmp_path):
    config = config_of(published)
    start = checkpoints.parse(str(published))
    workdir = Workdir(tmp_path / "run")
    workdir.open(config)
    tokenizer = assemble.tokenizer(config, workdir, start)
    template = assemble.chat_template(config, tokenizer)
    assert template.jinja == OWN
    assert template.render_prompt([chat.Message("user", "?")]) == "[user]?<|endoftext|>[assistant]"
    # Turns end with <|im_end|>, which training learns; the model's other ends stop a sampler too.
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (258, (256, 257))
    again = assemble.tokenizer(config, workdir, start)  # on resume
    assert (again.eos_id, again.stop_ids) == (258, (256, 257))
    assert (workdir.tokenizer / "chat_template.jinja").read_text() == OWN
    assert assemble.generation(config, tokenizer)["eos_token_id"] == [258, 256, 257]


def test_a_later_run_finds_the_template_in_the_earlier_ones_folder(published, tmp_path):
    config, earlier = config_of(published), tmp_path / "earlier"
    workdir = Workdir(earlier)
    workdir.open(config)
    assemble.tokenizer(config, workdir, checkpoints.parse(str(published)))
    (earlier / "checkpoints" / "sft" / "1").mkdir(parents=True)
    say = lambda name: (earlier / "config.json").write_text(
        json.dumps({"architecture": {}, "chat_template": name})
    )
    say(str(published))
    start = checkpoints.parse(f"{earlier}@sft")
    assert start.chat_template() == str(earlier / "tokenizer")
    assert chat.template_for(start.chat_template(), start.tokenizer()).jinja == OWN
    say("plain")
    assert checkpoints.parse(f"{earlier}@sft").chat_template() == "plain"


def test_a_template_can_be_a_file(published, tmp_path):
    (tmp_path / "mine.jinja").write_text(OWN.replace("[", "<").replace("]", ">"))
    config = config_of(published, template=str(tmp_path / "mine.jinja"))
    tokenizer = chat.fitted(load_tokenizer(published), assemble.template_name(config))
    prompt = assemble.chat_template(config, tokenizer).render_prompt([chat.Message("user", "?")])
    assert prompt == "<user>?<|endoftext|><assistant>"


def test_tags_reach_rewards_and_evaluations(published):
    config = config_of(published, think_open="<r>", think_close="</r>")
    text = "<r>it was 41</r>42"
    assert assemble.split_reasoning(config)(text) == ("it was 41", "42")
    terms = {"right": RewardConfig("math"), "form": RewardConfig("format")}
    completion = Completion(text=text, ids=(1,), logprobs=(0.0,), truncated=False)
    other = Completion(text="<think>41</think>", ids=(1,), logprobs=(0.0,), truncated=False)
    with assemble.rewards(config, terms) as reward:
        assert reward([completion, other], ["42", "41"])[0][0] == 2.0
        assert reward([other], ["41"])[1]["form"] == [0.5]  # an answer without a reasoning
    config.chat.think_close = "<r>"
    with pytest.raises(ValueError, match=r"the think tags are '<r>' and '<r>'"):
        assemble.think_tags(config)


def test_the_day_is_the_configs(published):
    assert assemble.chat_date(config_of(published)) == datetime.date(2024, 7, 26)
    assert assemble.chat_date(config_of(published, date="")) is None
    with pytest.raises(ValueError, match=r"chat\.date is 'today'; it must be a day"):
        assemble.chat_date(config_of(published, date="today"))


def test_generation_stops_at_every_end_of_a_published_model():
    """As transformers' does with the eos_token_id list of generation_config.json."""
    params, encode, key = tiny_params(), lambda text: [1, 2, 3], jax.random.key(0)
    sampling = Sampling(max_tokens=12, temperature=1.0)
    drawn = lambda *stops: build_generate(tiny_model(), encode, str, -1, stop_ids=stops)(
        params, ["?"], sampling, key
    )[0][0]
    whole = drawn()
    stops = (whole.ids[4], whole.ids[7])
    cut, first = drawn(*stops), min(map(whole.ids.index, stops))
    assert cut.ids == whole.ids[: first + 1] and not cut.truncated and whole.truncated


def test_evaluations_pass_the_tokenizers_stops_on(published, monkeypatch):
    tokenizer = chat.fitted(load_tokenizer(published), str(published))
    given = []
    monkeypatch.setattr(evaluation, "build_generate", lambda *args: given.extend(args))
    config = config_of(published, think_close="</r>", think_open="<r>")
    evaluation.generator(config, tokenizer, None, 4)
    assert given[3] == 258 and given[-1] == (256, 257)
    assert given[-2].close == tuple(tokenizer.encode("</r>"))


def test_of_several_stages_the_template_is_that_of_where_the_first_starts(published, monkeypatch):
    """By name `rl` comes before the `sft` that it starts from."""
    monkeypatch.setattr(assemble, "device_mesh", lambda mesh: None)
    config = launch.load_config("lfm")
    config.stages.sft.init["from"] = str(published)
    assert assemble.template_name(config) == str(published)
    sft, rl = pipeline.stages_of(config)
    assert (sft.name, rl.name) == ("sft", "rl")
    assert sft.data.chat_template == str(published)
