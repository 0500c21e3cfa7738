"""The stage of kind `traces`: a teacher writes, rewards grade, what is kept is data to train on.

SCoTD (arXiv 2306.14050) samples N = 30 chains of thought a question and trains on all or on those
with the right answer; Fine-tune-CoT (arXiv 2212.10071) on the right ones.

The teacher is a checkpoint, or a model of a server. Text is all that travels: a checkpoint of
another run or of Hugging Face's answers with its own shape, tokenizer and chat template, whatever
the run's are. Only a gate (rollout/gated.py) wants one tokenizer for both.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxreason.data import prompts as prompts_lib
from jaxreason.model.decoder import LanguageModel
from jaxreason.parallel import hosts
from jaxreason.recipes import assemble, checkpoints, evaluation, speakers, trace_files, weights
from jaxreason.recipes.generate import sampling_of
from jaxreason.recipes.run import Run
from jaxreason.recipes.speakers import Speaker
from jaxreason.recipes.workdir import Workdir
from jaxreason.rewards import mix
from jaxreason.rollout import gated, remote
from jaxreason.text import chat
from jaxreason.text.tokenizer import Tokenizer
from jaxreason.train.metrics import Progress
from jaxreason.types import Completion, Prompt, Sampling

# Of questions, their number among all, and what hears of progress -> completions[question][sample];
# a text stands for one that the teacher refused, and says why.
Ask = Callable[[Sequence[str], int, Callable], list[list[Completion | str]]]


@dataclasses.dataclass(frozen=True)
class TracesStage:
    """What can be checked of the stage before anything is built."""

    name: str
    section: ConfigDict
    start: checkpoints.Checkpoint  # the teacher; `random`, and never read, where a server answers
    server: remote.ServerConfig | None
    student: checkpoints.Checkpoint | None  # of the gate, where there is one
    prompts: prompts_lib.PromptConfig
    rewards: dict[str, mix.RewardConfig]
    sampling: Sampling
    keep: trace_files.Keep

    @property
    def starts(self) -> dict[str, checkpoints.Checkpoint]:
        """The checkpoints that must be there before, by the keys that name them."""
        named = {"init.from": self.start, "gate.from": self.student}
        return {key: start for key, start in named.items() if start is not None}

    @property
    def length(self) -> int:
        return self.sampling.max_tokens


def plan(config: ConfigDict, name: str, section: ConfigDict) -> TracesStage:
    """Raises ValueError, naming key, value and what would be right, for whatever cannot run."""
    data, server = section.data, None
    prompts = prompts_lib.PromptConfig(
        sources=data.sources.to_dict(), shuffle=data.shuffle, seed=config.seed
    )
    for key, number, least in (
        ("data.num_questions", data.num_questions, 0),
        ("save_every", section.save_every, 1),
        ("rows", section.rows, 1),
    ):
        if number < least:
            raise ValueError(f"{key} is {number}; it must be {least} or more")
    sampling = sampling_of(section)
    if section.solved_by not in section.rewards:
        raise ValueError(
            f"solved_by is {section.solved_by!r}; it must be one of rewards: "
            f"{', '.join(section.rewards)}"
        )
    rewards = {
        reward: assemble.from_section(mix.RewardConfig, spec)
        for reward, spec in section.rewards.items()
    }
    if section.server.url:
        server = _server(section, sampling)
    start = checkpoints.parse("random" if server else _teacher_text(section))
    student = None
    if section.gate["from"]:
        _check_gate(section, server, sampling)
        student = checkpoints.parse(section.gate["from"], "gate.from")
    keep = trace_files.Keep(section.keep, section.per_question, sampling.num_samples)
    return TracesStage(name, section, start, server, student, prompts, rewards, sampling, keep)


def _teacher_text(section: ConfigDict) -> str:
    text = section.init["from"]
    if text in ("", "random"):
        raise ValueError(
            f"init.from is {text!r}; a teacher is a checkpoint that was trained, or a server "
            "(server.url)"
        )
    return text


def _server(section: ConfigDict, sampling: Sampling) -> remote.ServerConfig:
    if section.init["from"]:
        raise ValueError(
            f"init.from is {section.init['from']!r} and server.url {section.server.url!r}; there "
            "is one teacher: set one of them"
        )
    if sampling.thinking is not None:
        raise ValueError(
            "sampling.thinking is set; a server has no thinking budget of ours: say what it knows "
            "in server.extra"
        )
    return assemble.from_section(remote.ServerConfig, section.server)


def _check_gate(
    section: ConfigDict, server: remote.ServerConfig | None, sampling: Sampling
) -> None:
    if server is not None:
        raise ValueError(
            f"gate.from is {section.gate['from']!r} and server.url {section.server.url!r}; a gate "
            "reads the teacher's every token: a checkpoint"
        )
    if section.gate["from"] == "random" or section.gate.threshold < 0:
        raise ValueError(
            f"gate is {section.gate.to_dict()}; its student is a checkpoint, and its threshold a "
            "probability"
        )
    if hosts.several():
        raise ValueError("gate.from is set and there are several processes; a gate works in one")
    gated.check_sampling(sampling)


def check_data(
    config: ConfigDict, stage: TracesStage, tokenizer: Tokenizer, workdir: Workdir
) -> None:
    """Opens the questions, reads every gold answer, and looks for the teacher; of all processes.

    Raises ValueError naming the first that is wrong. A stage that is done asks no server.
    """
    if workdir.marker(stage.name) is None:
        hosts.first(lambda: _questions(config, stage, workdir))
        if stage.server is not None:
            hosts.first(remote.Remote(stage.server).check)
        else:
            _speakers(config, stage, workdir, tokenizer, None)


def _questions(
    config: ConfigDict, stage: TracesStage, workdir: Workdir
) -> tuple[list[Prompt], int]:
    """In the order of one epoch: a part of it is a random one where `data.shuffle` says so.

    Also how many malformed records were left out.
    """
    with assemble.rewards(config, stage.rewards) as reward:
        stream = prompts_lib.build(
            stage.prompts, workdir.data, say=lambda line: None, check=reward.check
        )
    wanted = stage.section.data.num_questions
    if wanted > len(stream):
        raise ValueError(f"data.num_questions is {wanted}; there are {len(stream)}")
    return stream.next(wanted or len(stream)), stream.num_quarantined


# -------------------------------------------------------------------------------- the teacher


def _speakers(
    config: ConfigDict,
    stage: TracesStage,
    workdir: Workdir,
    tokenizer: Tokenizer,
    model: LanguageModel | None,
) -> list[Speaker]:
    """The teacher, and the student of a gate.

    Raises ValueError where a checkpoint cannot be read, or the two have other tokens.
    """
    template = stage.section.template
    teacher, *students = (
        speakers.find(config, start, template, workdir, f"{stage.name}-{key.split('.')[0]}",
                      tokenizer, model)
        for key, start in stage.starts.items()
    )  # fmt: skip
    for student in students:
        if student.tokenizer.fingerprint() != teacher.tokenizer.fingerprint():
            raise ValueError(
                f"gate.from is {student.start.text!r}, which has another tokenizer than the "
                f"teacher {teacher.start.text!r}; a gate compares token by token"
            )
    return [teacher, *students]


def _asking(run: Run, stage: TracesStage) -> Ask:
    if stage.server is not None:
        return _asking_server(run, stage)
    found = _speakers(run.config, stage, run.workdir, run.tokenizer, run.model)
    key = assemble.stage_key(run.config.seed, stage.name)
    draw = (_gated if stage.student is not None else _drawing)(run, stage, found)

    def ask(texts: Sequence[str], begin: int, on_progress: Callable) -> list[list[Completion]]:
        first = begin * stage.sampling.num_samples
        return draw(texts, stage.sampling, key, on_progress=on_progress, first=first)

    return ask


def _drawing(run: Run, stage: TracesStage, found: Sequence[Speaker]) -> Callable:
    (teacher,) = found
    return teacher.generator(stage.section.rows, run.workdir.checkpoints)


def _gated(run: Run, stage: TracesStage, found: Sequence[Speaker]) -> Callable:
    """Both models whole on the first device."""
    models, params = [], []
    for speaker in found:
        own = speaker.model
        models.append(LanguageModel(own.config, own.execution, None, own.valid_vocab))
        params.append(weights.load(speaker.start, models[-1], run.workdir.checkpoints))
    teacher, section = found[0], stage.section
    generate = gated.build_gated(
        gated.Pair(*models),
        evaluation.prompt_encoder(teacher.config, teacher.tokenizer),
        teacher.tokenizer.decode,
        (teacher.tokenizer.eos_id, *teacher.tokenizer.stop_ids),
        section.rows,
    )
    return functools.partial(generate, gated.Pair(*params), threshold=section.gate.threshold)


def _asking_server(run: Run, stage: TracesStage) -> Ask:
    """Completions in the tokens of the run's tokenizer; the first process asks for all."""
    server, tags = remote.Remote(stage.server), assemble.think_tags(run.config)
    own = speakers.with_template(run.config, stage.section.template)
    template = assemble.chat_template(own, run.tokenizer)

    def completion(answer: remote.Answer) -> Completion | str:
        if answer.refused:
            return answer.refused
        text = as_text(answer, tags)
        return Completion(text, tuple(run.tokenizer.encode(text)), (), answer.truncated)

    def ask(texts: Sequence[str], begin: int, on_progress: Callable) -> list[list]:
        prompts = texts
        if stage.server.endpoint == "completions":
            thinking = own.chat.thinking
            turn = lambda text: [chat.Message("user", text)]
            prompts = [template.render_prompt(turn(text), thinking) for text in texts]
        answers = hosts.first(lambda: server.ask(prompts, stage.sampling, on_progress))
        found = [[completion(answer) for answer in row] for row in answers or []]
        if begin == 0:  # later a small part may be refused whole: counted, not an end of the run
            hosts.first(lambda: _check_answered(stage, found))
        return found

    return ask


def as_text(answer: remote.Answer, tags: chat.ThinkTags) -> str:
    """As a model writes it that thinks between the tags; they may stand in the content already."""
    if answer.reasoning is None:
        return answer.content
    thought = f"{tags.open}\n{answer.reasoning.strip(chr(10))}\n"
    if answer.truncated and not answer.content:
        return thought  # the limit came before the end of thinking
    return f"{thought}{tags.close}\n\n{answer.content}"


def _check_answered(stage: TracesStage, found: list[list[Completion | str]]) -> None:
    refusals = [each for row in found for each in row if isinstance(each, str)]
    if refusals and len(refusals) == sum(map(len, found)):
        raise ValueError(
            f"server.url is {stage.server.url!r}; it refused every one of {len(found)} questions: "
            f"{refusals[0]}"
        )


# ---------------------------------------------------------------------------------- the stage


def run_stage(run: Run, stage: TracesStage) -> None:
    """Samples, resuming where it was, and leaves the kept traces and the stage's done marker."""
    files = trace_files.TraceFiles(run.workdir.data, stage.name, stage.sampling.num_samples)
    if run.workdir.marker(stage.name) and hosts.told(files.kept.exists):
        return
    began = time.monotonic()
    prompts, quarantined = _questions(run.config, stage, run.workdir)
    teacher = _teacher_name(run, stage)
    done = hosts.told(lambda: files.resume([p.id for p in prompts], teacher, run.progress.say))
    if done < len(prompts):
        run.progress.say(f"{stage.name}: {len(prompts)} questions to {teacher}")
        _sample(run, stage, prompts, teacher, files, done)

    def outcome() -> dict:
        counts = files.select(stage.keep)
        run.progress.say(f"{stage.name}: {trace_files.told(counts)}")
        seconds = round(time.monotonic() - began, 1)
        return {"teacher": teacher, **counts, "quarantined": quarantined, "seconds": seconds}

    run.workdir.mark(stage.name, outcome)


def _sample(
    run: Run,
    stage: TracesStage,
    prompts: Sequence[Prompt],
    teacher: str,
    files: trace_files.TraceFiles,
    done: int,
) -> None:
    """The questions from number `done` on, in batches that are on the disk before the next."""
    ask, every = _asking(run, stage), stage.section.save_every
    split, N = assemble.split_reasoning(run.config), stage.sampling.num_samples
    run.progress.start(stage.name, len(prompts), done)
    with assemble.rewards(run.config, stage.rewards) as reward:
        for begin in range(done, len(prompts), every):
            part = prompts[begin : begin + every]
            report = _reporter(run.progress, begin, len(prompts), N)
            drawn = ask([prompt.text for prompt in part], begin, report)

            def write(part=part, drawn=drawn) -> None:
                flat = [each for row in drawn for each in row]
                answers = [prompt.answer for prompt in part for _ in range(N)]
                grades = _graded(reward, stage.section.solved_by, flat, answers)
                facts = [{"id": p.id, "question": p.text, "answer": p.answer} for p in part]
                files.append(
                    {
                        **facts[i // N],
                        **_trace(completion, split),
                        **grades[i],
                        "sample": i % N,
                        "teacher": teacher,
                    }
                    for i, completion in enumerate(flat)
                )

            hosts.first(write)
    run.progress.stop()


def _graded(
    reward: mix.Reward, solved_by: str, drawn: Sequence[Completion | str], answers: Sequence[str]
) -> list[dict[str, Any]]:
    """reward and correct of each; a refused one has neither."""
    there = [i for i, each in enumerate(drawn) if not isinstance(each, str)]
    totals, parts = reward([drawn[i] for i in there], [answers[i] for i in there])
    grades = [{"reward": None, "correct": False} for _ in drawn]
    for i, total, solved in zip(there, totals, parts[solved_by], strict=True):
        grades[i] = {"reward": total, "correct": solved >= 1}
    return grades


def _trace(completion: Completion | str, split: Callable) -> dict[str, Any]:
    """What was written. An answer after an end of thinking that never came is empty."""
    if isinstance(completion, str):
        return {"reasoning": None, "response": "", "num_tokens": 0, "truncated": False,
                "logprob": None, "refused": completion}  # fmt: skip
    reasoning, response = split(completion.text)
    known = bool(completion.logprobs)
    written = {
        "reasoning": reasoning,  # null: it wrote no tags of thinking
        "response": response,
        "num_tokens": completion.num_tokens,
        "truncated": bool(completion.truncated),
        "logprob": round(sum(completion.logprobs), 4) if known else None,
    }
    if isinstance(completion, gated.Gated):
        written["accepted"] = sum(completion.accepted)
    return written


def _teacher_name(run: Run, stage: TracesStage) -> str:
    if stage.server is not None:
        return stage.server.model_name
    return trace_files.author(stage.start, run.workdir)


def _reporter(progress: Progress, begin: int, total: int, num_samples: int) -> Callable:
    shown = [begin]

    def report(finished: int, _: int, tokens: int) -> None:
        answered = begin + finished // num_samples
        if answered - shown[-1] >= max(1, total // 50):
            progress.update(answered, f"{tokens:,} tokens in this part")
            shown.append(answered)

    return report
