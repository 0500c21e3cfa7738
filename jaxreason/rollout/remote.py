"""Completions of a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, hosted APIs.

    server = Remote(ServerConfig(url="http://localhost:8000/v1", model_name="Qwen/Qwen3-8B"))
    server.check()                                   # a dead URL, a wrong key, an unknown model
    answers = server.ask(["1+1="], sampling)         # answers[prompt][sample]

Many requests are under way at a time; what is busy, slow or broken for a while is asked again.
No device takes part.
"""

import dataclasses
import datetime
import email.utils
import functools
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxreason.types import Sampling

ENDPOINTS = {"chat": "/chat/completions", "completions": "/completions"}
_REASONING = ("reasoning_content", "reasoning")  # DeepSeek, vLLM and SGLang; newer vLLM, OpenRouter
_COUNTS = ("prompt_tokens", "completion_tokens")
_LONGEST_PAUSE = 60.0  # seconds between two tries, where the server asks for no more
_PATIENCE = 900.0  # seconds: a server that asks for a longer wait is out of quota
_CHECK_SECONDS = 30.0  # for an answer to the first questions
_CHECK_RETRIES = 2
_BROKEN_TEXT = 200  # characters of what a server said that are shown


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Where a server is, and how it may be asked.

    Raises:
      ValueError: a field is out of its range, or the environment holds no key where one is named.
    """

    url: str  # up to the version, as in http://localhost:8000/v1
    model_name: str  # as the server calls it
    endpoint: str = "chat"  # chat: the server's own chat template; completions: a raw prompt
    key_variable: str = ""  # the environment's variable that holds the API key; "": no key
    concurrency: int = 32  # requests under way
    requests_per_minute: float = 0.0  # at most, tries again included; 0: no limit
    samples_per_request: int = 1  # `n`, for servers that know it
    timeout: float = 600.0  # seconds in which a server must say something
    max_retries: int = 8  # of one request
    backoff: float = 1.0  # seconds before the first of them; twice as long before each next
    # More fields of a request, as {"top_k": 20}; they win, and None removes one of ours.
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"server.url is {self.url!r}; it must begin with http:// or https://, as in "
                "http://localhost:8000/v1"
            )
        if not self.model_name:
            raise ValueError("server.model_name is empty; it must be a model of the server")
        if self.endpoint not in ENDPOINTS:
            raise ValueError(
                f"server.endpoint is {self.endpoint!r}; it must be one of {', '.join(ENDPOINTS)}"
            )
        for name, least in (("concurrency", 1), ("samples_per_request", 1), ("max_retries", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"server.{name} is {getattr(self, name)}; at least {least}")
        for name in ("requests_per_minute", "backoff"):
            if getattr(self, name) < 0:
                raise ValueError(f"server.{name} is {getattr(self, name)}; it must be 0 or more")
        if self.timeout <= 0:
            raise ValueError(f"server.timeout is {self.timeout}; it must be above 0")
        if self.key_variable and not os.environ.get(self.key_variable):
            raise ValueError(
                f"server.key_variable is {self.key_variable!r}; the environment has no such "
                "variable, or it is empty: set it to the API key"
            )

    @property
    def key(self) -> str:
        """The API key; it is read when it is needed, and kept nowhere."""
        return os.environ.get(self.key_variable, "") if self.key_variable else ""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One completion as the server tells it."""

    content: str
    reasoning: str | None = None  # where the server parts it from the content
    truncated: bool = False
    refused: str = ""  # why this question got no answer: what the server said of it


@dataclasses.dataclass
class Usage:
    """What was asked for so far."""

    requests: int = 0  # tries, those that failed included
    retries: int = 0
    prompt_tokens: int = 0  # as the server counts them
    completion_tokens: int = 0


class _Failure(Exception):
    """A try that may be made again, after so many seconds where the server says when."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class _Refusal(Exception):
    """The server will not answer this request, however often it is asked."""


class _Pace:
    """When the next request may start: evenly spaced, and after a pause that the server wants."""

    def __init__(self, per_minute: float, stop: threading.Event):
        self._interval = 60 / per_minute if per_minute else 0.0
        self._stop, self._lock, self._next = stop, threading.Lock(), 0.0

    def wait(self) -> None:
        """Returns when it is the caller's turn, or all is to stop."""
        while not self._stop.is_set():
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + self._interval
                    return
                left = self._next - now
            self._stop.wait(left)

    def pause(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class Remote:
    """A server. `usage` counts what was asked of it; one thread at a time calls `ask`."""

    def __init__(self, config: ServerConfig):
        import requests  # half a second of imports, for those who ask a server

        self.config, self.usage = config, Usage()
        self._errors = requests.exceptions
        self._session = requests.Session()
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=config.concurrency)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        self._stop = threading.Event()
        self._pace = _Pace(self.config.requests_per_minute, self._stop)

    # -- before anything is expensive --------------------------------------------------------------

    def check(self) -> None:
        """Raises ValueError in one line for a dead URL, a wrong key and an unknown model.

        The server's list of models is asked for. Where there is none, or the model is not on it
        (it may be an alias), the model is asked for one token.
        """
        seconds = min(_CHECK_SECONDS, self.config.timeout)
        try:
            response = self._send("GET", "/models", None, seconds)
        except _Failure as failure:
            raise ValueError(
                f"server.url is {self.config.url!r}; no server answers there: {failure}"
            ) from failure
        self._check_key(response)
        known = _model_names(response)
        if self.config.model_name in known:
            return
        body = self._body("Hi", 1, Sampling(max_tokens=1))
        try:
            self._post(body, min(_CHECK_RETRIES, self.config.max_retries), seconds)
        except _Refusal as refusal:
            listed = f"; it lists {', '.join(known[:5])}"
            if not known:
                listed = "; it lists no models: is the URL right, up to its version (/v1)?"
            raise ValueError(
                f"server.model_name is {self.config.model_name!r}; {self.config.url} refuses a "
                f"request for it: {refusal}{listed}"
            ) from refusal

    # -- questions ---------------------------------------------------------------------------------

    def ask(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        on_progress: Callable[[int, int, int], None] | None = None,
    ) -> list[list[Answer]]:
        """answers[prompt][sample]: `sampling.num_samples` of each, in any order of arrival.

        Args:
          on_progress: called with the samples that are there, all samples, and the completion
            tokens of the server's count; in the thread of the caller.

        Raises:
          ValueError: the key or the model is refused, or a request failed `max_retries` times.
        """
        self._start()
        step = self.config.samples_per_request
        asked: queue.SimpleQueue = queue.SimpleQueue()
        told: queue.SimpleQueue = queue.SimpleQueue()
        for place in range(len(prompts)):
            for first in range(0, sampling.num_samples, step):
                asked.put((place, first, min(step, sampling.num_samples - first)))
        total, done = len(prompts) * sampling.num_samples, 0
        found: list[list[Answer | None]] = [[None] * sampling.num_samples for _ in prompts]
        work = functools.partial(self._work, self._stop, asked, told, prompts, sampling)
        for _ in range(min(self.config.concurrency, asked.qsize())):
            # Daemons: one that waits for a server that hangs must not keep a stopped run alive.
            threading.Thread(target=work, daemon=True).start()
        try:
            while done < total:
                place, first, answers = told.get()
                if isinstance(answers, Exception):
                    raise answers
                found[place][first : first + len(answers)] = answers
                done += len(answers)
                if on_progress is not None:
                    on_progress(done, total, self.usage.completion_tokens)
        finally:
            self._stop.set()
        return found

    def _work(self, stop, asked, told, prompts: Sequence[str], sampling: Sampling) -> None:
        while not stop.is_set():
            try:
                place, first, count = asked.get_nowait()
            except queue.Empty:
                return
            try:
                answers = self._complete(prompts[place], count, sampling)
            except Exception as error:  # the thread that asked raises it
                stop.set()
                answers = error
            told.put((place, first, answers))

    def _complete(self, prompt: str, count: int, sampling: Sampling) -> list[Answer]:
        """So many answers; a server that gives fewer at once is asked for the rest."""
        answers: list[Answer] = []
        while len(answers) < count:
            body = self._body(prompt, count - len(answers), sampling)
            try:
                answers += self._post(body, self.config.max_retries, self.config.timeout)
            except _Refusal as refusal:
                answers += [Answer("", refused=str(refusal))] * (count - len(answers))
        return answers[:count]

    def _body(self, prompt: str, count: int, sampling: Sampling) -> dict[str, Any]:
        """The request. Fields that not every server knows are left out where they say nothing."""
        body: dict[str, Any] = {"model": self.config.model_name, "max_tokens": sampling.max_tokens}
        if self.config.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        body |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        body |= {"n": count} if count > 1 else {}
        body |= {"stop": list(sampling.stop)} if sampling.stop else {}
        body |= {
            name: getattr(sampling, name)
            for name, off in (("top_k", 0), ("min_p", 0), ("repetition_penalty", 1))
            if getattr(sampling, name) != off
        }
        body |= self.config.extra
        return {name: value for name, value in body.items() if value is not None}

    # -- one request -------------------------------------------------------------------------------

    def _post(self, body: dict[str, Any], retries: int, timeout: float) -> list[Answer]:
        """The answers in a response; tries that fail are made again, ever later.

        Raises _Refusal where the server will never answer this request, ValueError where it answers
        nothing at all: no key, no model, or too many failures.
        """
        for number in range(retries + 1):
            self._pace.wait()
            if self._stop.is_set():
                raise _Refusal("the run was stopped")
            try:
                path = ENDPOINTS[self.config.endpoint]
                return self._read(self._send("POST", path, body, timeout))
            except _Failure as failure:
                last = failure
            with self._lock:
                self.usage.retries += number < retries
            if last.wait is not None:
                if last.wait > _PATIENCE:
                    break
                self._pace.pause(last.wait)  # all of them: the limit is the key's, not a request's
            elif number < retries:
                longest = min(self.config.backoff * 2**number, _LONGEST_PAUSE)
                self._stop.wait(longest * random.uniform(0.5, 1))  # not all at the same moment
        waited = f", and asks for {last.wait:.0f} s of patience" if last.wait else ""
        raise ValueError(
            f"{self.config.url} failed {number + 1} times ({last}){waited}; the same command goes "
            "on where this run stopped"
        ) from last

    def _send(self, method: str, path: str, body: dict[str, Any] | None, timeout: float):
        """The response, read whole. Raises _Failure where none arrives."""
        with self._lock:
            self.usage.requests += method == "POST"
        connect = min(10.0, timeout)
        try:
            return self._session.request(
                method,
                self.config.url.rstrip("/") + path,
                json=body,
                timeout=(connect, timeout),
                auth=self._authorize,
                allow_redirects=False,  # a POST would become a GET
            )
        except self._errors.Timeout as error:
            raise _Failure(f"no answer in {timeout:g} s") from error
        except self._errors.RequestException as error:  # refused, reset, cut off
            raise _Failure(self._clean(type(error).__name__, str(error))) from error

    def _authorize(self, request):
        """As `auth`, so that no .netrc takes its place."""
        if self.config.key:
            request.headers["Authorization"] = f"Bearer {self.config.key}"
        return request

    def _read(self, response) -> list[Answer]:
        """Raises _Failure, _Refusal or ValueError where the response holds no answer."""
        self._check_key(response)
        status = response.status_code
        if status in (408, 409, 425, 429) or status >= 500:
            raise _Failure(f"status {status}: {self._said(response)}", _retry_after(response))
        if 300 <= status < 400:
            target = response.headers.get("Location", "nowhere")
            raise ValueError(f"{self.config.url} answers {status}; it points to {target}")
        if status != 200:
            raise _Refusal(f"status {status}: {self._said(response)}")
        try:
            content = response.json()
            answers = [_answer(choice) for choice in content["choices"]]
            usage = content.get("usage") or {}
            counts = {name: int(usage.get(name) or 0) for name in _COUNTS}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _Failure(f"no chat completion but {self._said(response)}") from error
        if not answers:
            raise _Failure("a response without choices")
        with self._lock:
            for name, count in counts.items():
                setattr(self.usage, name, getattr(self.usage, name) + count)
        return answers

    def _check_key(self, response) -> None:
        if response.status_code not in (401, 403):
            return
        name = self.config.key_variable
        what = f"the key of ${name}" if name else "a request without a key (server.key_variable)"
        raise ValueError(
            f"{self.config.url} refuses {what}: status {response.status_code}: "
            f"{self._said(response)}"
        )

    def _said(self, response) -> str:
        """The server's message, or the beginning of what it sent."""
        try:
            content = response.json()
            error = content.get("error", content)
            text = error.get("message", str(error)) if isinstance(error, dict) else str(error)
        except (ValueError, AttributeError):
            text = response.text
        return self._clean(text or "nothing")

    def _clean(self, *parts: str) -> str:
        """On one line, short, and without the key."""
        text = " ".join(": ".join(parts).split())
        if self.config.key:
            text = text.replace(self.config.key, "***")
        return text if len(text) <= _BROKEN_TEXT else text[:_BROKEN_TEXT] + "..."


def _answer(choice: Mapping[str, Any]) -> Answer:
    """A choice of a chat, or of a plain completion. Raises where it is neither."""
    truncated = choice.get("finish_reason") == "length"
    if "message" not in choice:
        return Answer(_text(choice["text"]), truncated=truncated)
    message = choice["message"]
    reasoning = next((_text(message[name]) for name in _REASONING if message.get(name)), None)
    return Answer(_text(message.get("content") or ""), reasoning, truncated)


def _text(value: Any) -> str:
    """Halves of surrogate pairs, which JSON may hold and no tokenizer reads, become U+FFFD."""
    if not isinstance(value, str):
        raise TypeError(f"a text is {type(value).__name__}")
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _model_names(response) -> list[str]:
    """The names in a list of models; none where there is no such list."""
    try:
        return [str(model["id"]) for model in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return []


def _retry_after(response) -> float | None:
    """Seconds until the server wants to be asked again; None where it does not say."""
    said = response.headers.get("Retry-After", "").strip()
    if not said:
        return None
    try:
        return max(0.0, float(said))
    except ValueError:
        pass  # a date, then
    try:
        at = email.utils.parsedate_to_datetime(said)
    except ValueError:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=datetime.UTC)
    return max(0.0, (at - datetime.datetime.now(datetime.UTC)).total_seconds())
