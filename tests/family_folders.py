"""Folders with tokenizers of the four families, and templates of the form that each one uses.

Qwen3's is the published one, Qwen2.5's is that without its last four tokens; Llama 3's and Gemma
3's are trained here with the published structure and a small vocabulary.
"""

import functools
import json
import pathlib

import jax
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxreason.checkpoint import hf
from jaxreason.model.config import DecoderConfig
from jaxreason.model.decoder import LanguageModel

FAMILIES = ("qwen3", "qwen2.5", "llama3", "gemma3")
IMAGE = (
    "<image_soft_token>"  # Gemma 3's 262,145th token; the tables of 1B and 270M have 262,144 rows
)

# ---------------------------------------------------------------------------------------- templates

QWEN25 = r"""{%- if tools %}
    {{- '<|im_start|>system\nTools:' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
    {{- '<|im_end|>\n' }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- elif not (m.role == 'system' and loop.first) %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

LLAMA3 = r"""{{- bos_token }}
{%- if not day is defined %}
    {%- set day = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set said = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set said = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today: " + day + "\n\n" + said + "<|eot_id|>" }}
{%- for message in messages %}
    {%- set role = 'ipython' if message.role == 'tool' else message['role'] %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
    {%- if message.role == 'tool' %}
        {{- message.content | tojson }}
    {%- else %}
        {{- message['content'] | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

GEMMA3 = r"""{{ bos_token }}
{%- set first = "" -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\n\n' -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Roles must alternate:
            user, assistant, user") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
"""

# ---------------------------------------------------------------------------------------- folders

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make(family: str, folder: pathlib.Path, shared_data: pathlib.Path) -> pathlib.Path:
    """The family's folder, as its instruct models publish it."""
    folder.mkdir(parents=True)
    definition, config, generation = _MAKERS[family](shared_data)
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return folder


def with_weights(folder: pathlib.Path, config: DecoderConfig) -> pathlib.Path:
    """A directory beside it: its tokenizer, template and ends, and random weights."""

    def copy_tokenizer(target: pathlib.Path) -> None:
        for path in folder.glob("tokenizer*"):
            (target / path.name).write_bytes(path.read_bytes())

    ends = json.loads((folder / "generation_config.json").read_text())
    model, params = folder.parent / "model", jax.jit(LanguageModel(config).init)(jax.random.key(0))
    hf.export_hf(model, config, params, generation=ends, save_tokenizer=copy_tokenizer)
    return model


def _qwen3(shared_data: pathlib.Path):
    folder = shared_data / "tokenizer_qwen3"
    read = lambda name: json.loads((folder / name).read_text(encoding="utf-8"))
    return read("tokenizer.json"), read("tokenizer_config.json"), [151645, 151643]


def _qwen25(shared_data: pathlib.Path):
    definition, config, ends = _qwen3(shared_data)
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["id"] < 151665]
    for number in range(151665, 151669):
        del config["added_tokens_decoder"][str(number)]
    return definition, config | {"chat_template": QWEN25}, ends


def _llama3(shared_data: pathlib.Path):
    """Byte-level BPE that takes whole words first; the post-processor adds the first token."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(**byte_level)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        _texts(shared_data), trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet)
    )
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "finetune_right_pad_id",
             "reserved_special_token_2", "start_header_id", "end_header_id", "eom_id", "eot_id",
             "python_tag"]  # fmt: skip
    names += [f"reserved_special_token_{i}" for i in range(3, 249)]
    specials = [f"<|{name}|>" for name in names]
    made.add_special_tokens(specials)
    begin = (specials[0], made.token_to_id(specials[0]))
    template = processors.TemplateProcessing(
        single=f"{begin[0]} $A", pair=f"{begin[0]} $A {begin[0]}:1 $B:1", special_tokens=[begin]
    )
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    config = {
        "added_tokens_decoder": {
            str(made.token_to_id(token)): _fields(token) for token in specials
        },
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": True,
        "chat_template": LLAMA3,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    ends = [made.token_to_id(f"<|{name}|>") for name in ("end_of_text", "eom_id", "eot_id")]
    return json.loads(made.to_str()), config, ends


def _gemma3(shared_data: pathlib.Path):
    """BPE with bytes for what it does not know, on text whose spaces are U+2581."""
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    words = (word for text in _texts(shared_data) for word in text.replace(" ", " ▁").split(" "))
    made.train_from_iterator(words, trainers.BpeTrainer(vocab_size=3000))
    trained = json.loads(made.to_str())["model"]
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    turns, runs = ["<start_of_turn>", "<end_of_turn>"], ["\n\n", "\n\n\n", "▁▁", "▁▁▁▁", "<table>"]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [*specials, *turns, *runs, *byte_pieces, *trained["vocab"]]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in trained["merges"]]
    made.model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    added = lambda token, special: tokenizers.AddedToken(token, special=special, normalized=False)
    made.add_special_tokens([added(token, True) for token in specials + turns])
    made.add_tokens([added(token, False) for token in runs])
    made.add_special_tokens([added(IMAGE, True)])  # last, and without a row: `rows`
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
    )
    config = {
        "added_tokens_decoder": {
            str(vocab[token]): _fields(token, token not in runs)
            for token in specials + turns + runs
        }
        | {str(made.token_to_id(IMAGE)): _fields(IMAGE)},
        "image_token": IMAGE,
        "add_bos_token": True,
        "bos_token": "<bos>",
        "eos_token": {"__type": "AddedToken", **_fields("<eos>")},
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "chat_template": [
            {"name": "default", "template": GEMMA3},
            {"name": "tool_use", "template": "{{ messages[0].content }}"},
        ],
        "tokenizer_class": "GemmaTokenizer",
    }
    return json.loads(made.to_str()), config, [vocab["<eos>"], vocab["<end_of_turn>"]]


_MAKERS = {"qwen3": _qwen3, "qwen2.5": _qwen25, "llama3": _llama3, "gemma3": _gemma3}


def _fields(token: str, special: bool = True) -> dict:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, "special": special, **flags}


@functools.cache
def _texts(shared_data: pathlib.Path) -> tuple[str, ...]:
    """The beginnings of some books: about a second of training."""
    with open(shared_data / "text_books" / "val.jsonl", encoding="utf-8") as lines:
        return tuple(json.loads(line)["text"][:40_000] for line in lines)
