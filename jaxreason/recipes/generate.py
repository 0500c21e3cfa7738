"""Answers of any checkpoint: in a conversation on the terminal, or to all questions of a file."""

import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxreason.data.sources import JsonlSource, template_fields
from jaxreason.model.decoder import LanguageModel
from jaxreason.parallel import hosts
from jaxreason.recipes import assemble, checkpoints, terminal, weights
from jaxreason.recipes.workdir import Workdir
from jaxreason.report.summary import read_lines, write_whole
from jaxreason.rollout.engine import EngineConfig
from jaxreason.rollout.generate import build_generate
from jaxreason.text import chat
from jaxreason.text.tokenizer import Tokenizer
from jaxreason.train.metrics import Progress
from jaxreason.types import Completion, Sampling, ThinkingBudget


def run(config: ConfigDict, folder: pathlib.Path) -> None:
    """Writes nothing but `config.output`; `folder`, a run's workdir, stays as it is."""
    progress = Progress()

    # --- everything that can be wrong is found before anything is expensive -----------------------
    if hosts.several():
        raise ValueError(
            f"recipe is 'generate' and there are {hosts.count()} processes; answers are given by "
            "one, on all devices of its host (run.processes.number=1)"
        )
    start = checkpoints.parse(config.init["from"])
    if start.kind == "run" and start.directory is None:
        raise ValueError(
            f"init.from is {start.text!r}; there is no run to take it from: give "
            "WORKDIR@STAGE[@STEP] or a Hugging Face directory"
        )
    shape = assemble.architecture(config, start)
    sampling = sampling_of(config)
    fields = template_fields(config.prompt_template, "prompt_template")
    if config.prompts:
        prompts, output = read_prompts(config, fields), Output(config)
        done = output.resume(prompts)
    elif fields != ["prompt"]:
        raise ValueError(
            f"prompt_template is {config.prompt_template!r}; in a conversation its one field is "
            "{prompt}"
        )
    if config.rows < 1:
        raise ValueError(f"rows is {config.rows}; it must be at least 1")
    if config.remember not in ("auto", "true", "false"):
        raise ValueError(f"remember is {config.remember!r}; it must be auto, true or false")

    # --- the model --------------------------------------------------------------------------------
    with tempfile.TemporaryDirectory() as scratch:  # where a tokenizer is put together
        tokenizer = assemble.tokenizer(config, Workdir(pathlib.Path(scratch)), start)
    model = assemble.language_model(config, shape, tokenizer)
    speaker = _speaker(config, start, model, tokenizer, folder)

    # --- its answers ------------------------------------------------------------------------------
    if config.prompts:
        answer_all(speaker, prompts, done, sampling, output, progress)
        return
    screen = terminal.Screen(sys.stdout, speaker.template.tags)
    screen.say(f"{start.name}: {model.num_params:,} parameters. {terminal.HELP}")
    several = {"true": True, "false": False, "auto": speaker.template.parts_turns}
    ask = lambda line: config.prompt_template.format(prompt=line)
    lines = terminal.lines(sys.stdin)
    terminal.converse(speaker, sampling, ask, several[config.remember], lines, screen)


def sampling_of(config: ConfigDict) -> Sampling:
    """`config.sampling`. Raises ValueError naming the key."""
    fields = config.sampling.to_dict()
    thinking = ThinkingBudget(**fields.pop("thinking"))
    limited = thinking.max_tokens is not None or thinking.waits
    return Sampling(
        **{**fields, "stop": tuple(fields["stop"]), "stop_ids": tuple(fields["stop_ids"])},
        thinking=thinking if limited else None,
    )


def _speaker(
    config: ConfigDict,
    start: checkpoints.Checkpoint,
    model: LanguageModel,
    tokenizer: Tokenizer,
    folder: pathlib.Path,
) -> terminal.Speaker:
    template = assemble.chat_template(config, tokenizer)

    def encode(conversation: terminal.Conversation) -> list[int]:
        return chat.encode_prompt(tokenizer, template, conversation, config.chat.thinking)

    # One conversation reads best in small pieces; a file of questions fills every slot.
    engine = EngineConfig(slots=config.rows) if config.prompts else EngineConfig(slots=1, steps=8)
    generate = build_generate(
        model,
        encode,
        tokenizer.decode,
        tokenizer.eos_id,
        engine,
        chat.thinking_ids(tokenizer, template.tags, config.chat.wait),
        tokenizer.stop_ids,
    )
    params = weights.load(start, model, Workdir(folder).checkpoints)
    if params is None:
        params = model.init(assemble.stage_key(config.seed, "init"))
    return terminal.Speaker(
        answer=lambda *args, **callbacks: generate(params, *args, **callbacks),
        template=template,
        tokenizer=tokenizer,
        key=assemble.stage_key(config.seed, "generate"),
    )


# ----------------------------------------------------------------------------- questions of a file


def read_prompts(config: ConfigDict, fields: Sequence[str]) -> list[str]:
    """The questions of `config.prompts`: records of JSONL, or the lines of any other text file.

    Raises ValueError naming the file, and the line, of what cannot be read.
    """
    path = pathlib.Path(config.prompts).expanduser()
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        with tempfile.TemporaryDirectory() as scratch:
            wanted = dict.fromkeys(fields, "")
            source = JsonlSource(str(path), fields=wanted, data_dir=scratch, key="prompts")
            faults = read_lines(pathlib.Path(scratch) / "quarantine.jsonl")
            records = [source[i] for i in range(len(source))]
        if faults:
            first = faults[0]
            raise ValueError(f"prompts: {first['file']} line {first['line']}: {first['reason']}")
    elif path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        records = [{"prompt": line} for line in lines if line.strip()]
        if fields != ["prompt"] or not records:
            raise ValueError(
                f"prompts is {config.prompts!r}, a text of {len(records)} questions, a line each: "
                "their field in prompt_template is {prompt}"
            )
    else:
        raise ValueError(f"prompts is {config.prompts!r}; no such file")
    return [config.prompt_template.format(**record) for record in records]


class Output:
    """`config.output`: line i answers question i. It grows by `save_every` lines at a time."""

    def __init__(self, config: ConfigDict):
        self.path = pathlib.Path(config.output).expanduser()
        self.every = config.save_every
        # A part of `save_every` questions is drawn with one key: other parts, other answers.
        made_by = {"from": config.init["from"], "seed": config.seed, "save_every": self.every}
        made_by |= {"sampling": config.sampling.to_dict(), "chat": config.chat.to_dict()}
        self._made_by = json.loads(json.dumps(made_by))  # as it is read back
        if not config.output or self.path.is_dir():
            raise ValueError(f"output is {config.output!r}; it must name a file")
        if self.every < 1:
            raise ValueError(f"save_every is {self.every}; it must be at least 1")

    def resume(self, prompts: Sequence[str]) -> int:
        """How many questions are answered; what was cut off in the middle is dropped.

        Raises ValueError where the file holds something else than answers to these questions.
        """
        foreign = ValueError(
            f"output is {str(self.path)!r}, which holds something else than answers to these "
            f"questions with the same {', '.join(self._made_by)}: give another file, or remove it"
        )
        try:
            lines = read_lines(self.path)
        except json.JSONDecodeError as error:
            raise foreign from error
        for line, prompt in zip(lines, prompts):
            own = {"prompt": prompt, "made_by": self._made_by}
            if not isinstance(line, dict) or any(line.get(k) != v for k, v in own.items()):
                raise foreign
        self.path.parent.mkdir(parents=True, exist_ok=True)
        done = len(lines) if len(lines) >= len(prompts) else len(lines) // self.every * self.every
        write_whole(self.path, "".join(map(_json_line, lines[:done])))
        return done

    def append(self, prompt: str, completions: Sequence[dict[str, Any]]) -> None:
        line = {"prompt": prompt, "completions": completions, "made_by": self._made_by}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_json_line(line))


def _json_line(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def answer_all(
    speaker: terminal.Speaker,
    prompts: Sequence[str],
    done: int,
    sampling: Sampling,
    output: Output,
    progress: Progress,
) -> None:
    """Answers all but the first `done` questions."""
    progress.start("generate", len(prompts), done)
    shown = [done]  # how many answers the last report knew of
    for begin in range(done, len(prompts), output.every):
        part = prompts[begin : begin + output.every]
        part_key = jax.random.fold_in(speaker.key, begin)
        conversations = [(chat.Message("user", prompt),) for prompt in part]

        def report(finished: int, total: int, tokens: int, begin=begin) -> None:
            answered = begin + finished // sampling.num_samples
            if answered - shown[-1] >= max(1, len(prompts) // 50):
                progress.update(answered, f"{tokens:,} tokens in this part")
                shown.append(answered)

        found = speaker.answer(conversations, sampling, part_key, on_progress=report)
        for prompt, completions in zip(part, found, strict=True):
            output.append(prompt, [_line(speaker, c) for c in completions])
    progress.stop()
    progress.say(f"{len(prompts)} questions answered: {output.path}")


def _line(speaker: terminal.Speaker, completion: Completion) -> dict[str, Any]:
    _, answer = chat.split_reasoning(completion.text, speaker.template.tags)
    return {
        "text": completion.text,
        "answer": answer,
        "num_tokens": completion.num_tokens,
        "truncated": bool(completion.truncated),
    }
