"""A server as teacher: what is asked of it, what its answers become, and its faults."""

import contextlib
import email.utils
import socket
import threading
import time

import openai_server
import pytest
from openai_server import MODEL, choice, serving

from jaxreason.rollout import remote
from jaxreason.rollout.remote import Answer, Remote, ServerConfig
from jaxreason.types import Sampling

PROMPTS = [f"{i}+{i}=" for i in range(6)]


def double(body):
    """2 i of "i+i=", thought about."""
    prompt = body["messages"][0]["content"]
    number = int(prompt.split("+")[0])
    return [choice(str(2 * number), f"twice {number}")] * body.get("n", 1)


RIGHT = [Answer(str(2 * i), f"twice {i}") for i in range(6)]


@pytest.fixture
def server():
    with serving(double) as started:
        yield started


def client(server, **changes) -> Remote:
    fields = dict(url=server.url, model_name=MODEL, backoff=0.01, timeout=30.0, concurrency=4)
    return Remote(ServerConfig(**{**fields, **changes}))


def ask(server, sampling=Sampling(max_tokens=32), prompts=PROMPTS, **changes):
    asked = client(server, **changes)
    return asked.ask(prompts, sampling), asked.usage


# ------------------------------------------------------------------------ questions and answers


def test_every_sample_of_every_question_is_asked_for_and_counted(server):
    told, together = [], threading.Barrier(4, timeout=30)

    def answer(body):
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait()  # the first four arrive while none of them is answered
        together.abort()
        return double(body)

    server.answer = answer
    asked = client(server)
    answers = asked.ask(PROMPTS, Sampling(max_tokens=32, num_samples=3), lambda *n: told.append(n))
    assert answers == [[right] * 3 for right in RIGHT]
    assert [n[:2] for n in told] == [(i, 18) for i in range(1, 19)] and told[-1][2] == 18 * 7
    assert asked.usage == remote.Usage(18, 0, 180, 126)
    assert all("n" not in body for body in server.bodies)
    assert server.most_active == 4  # under way at a time: concurrency


def test_a_request_says_what_the_sampling_says_and_no_more(server):
    sampling = Sampling(max_tokens=32, temperature=0.7, top_p=0.9, stop=("\n\n",))
    ask(server, sampling, PROMPTS[:1])
    assert server.bodies == [
        {
            "path": "/v1/chat/completions",
            "model": MODEL,
            "messages": [{"role": "user", "content": "0+0="}],
            "max_tokens": 32,
            "temperature": 0.7,
            "top_p": 0.9,
            "stop": ["\n\n"],
        }
    ]
    extra = {"max_tokens": None, "max_completion_tokens": 64, "reasoning_effort": "low"}
    ask(server, Sampling(max_tokens=32, top_k=20, min_p=0.1), PROMPTS[:1], extra=extra)
    last = server.bodies[-1]
    assert "max_tokens" not in last and last["max_completion_tokens"] == 64
    assert (last["reasoning_effort"], last["top_k"], last["min_p"]) == ("low", 20, 0.1)


def test_several_samples_a_request_and_fewer_than_were_asked_for(server):
    """DeepSeek's API takes no notice of n: the rest is asked for again."""
    answers, usage = ask(server, Sampling(max_tokens=8, num_samples=5), samples_per_request=3)
    assert answers == [[right] * 5 for right in RIGHT]
    assert sorted(body["n"] for body in server.bodies) == [2] * 6 + [3] * 6 and usage.requests == 12
    server.answer = lambda body: double(body)[:1]
    answers, usage = ask(server, Sampling(max_tokens=8, num_samples=5), samples_per_request=3)
    assert answers == [[right] * 5 for right in RIGHT] and usage.requests == 30


@pytest.mark.parametrize(
    "told, answer",
    [
        (choice("4", "2+2", field="reasoning_content"), Answer("4", "2+2")),
        (choice("4", "2+2", field="reasoning"), Answer("4", "2+2")),
        (choice("<think>2+2</think>4"), Answer("<think>2+2</think>4")),
        (choice(None, "2+2+2+", finish="length"), Answer("", "2+2+2+", truncated=True)),
        (choice("4 and", finish="length"), Answer("4 and", truncated=True)),
        (choice("4", ""), Answer("4")),
        (choice("a\ud83d\ude00b\ud83d"), Answer("a\U0001f600b\ufffd")),  # no half of a pair
        ({"text": "2+2=4", "finish_reason": "stop"}, Answer("2+2=4")),
    ],
)
def test_what_a_choice_becomes(server, told, answer):
    server.answer = lambda body: [told]
    assert ask(server, prompts=["2+2="])[0] == [[answer]]


def test_plain_completions_get_the_prompt_as_it_is(server):
    server.answer = lambda body: [{"text": body["prompt"][::-1], "finish_reason": "length"}]
    answers, _ = ask(server, prompts=["ab"], endpoint="completions")
    assert answers == [[Answer("ba", truncated=True)]]
    assert server.bodies[0]["path"] == "/v1/completions" and "messages" not in server.bodies[0]


# ---------------------------------------------------------------------------------------- faults

FAULTS = {
    "busy": openai_server.status(429),
    "broken": openai_server.status(500),
    "gateway": openai_server.status(502, "<html>Bad Gateway</html>"),
    "hangs": openai_server.hang(1.0),
    "resets": openai_server.reset,
    "cuts off": openai_server.cut_off,
    "no JSON": openai_server.raw(b"<html>a proxy</html>"),
    "half of JSON": openai_server.raw(b'{"choices": [{"message"'),
    "another JSON": openai_server.raw(b'{"object": "error"}'),
    "a list": openai_server.raw(b"[]"),
    "no choices": openai_server.raw(b'{"choices": []}'),
    "no text": openai_server.raw(b'{"choices": [{"message": {"content": [1]}}]}'),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_passing_fault_costs_a_try_and_nothing_else(server, name):
    server.script = [None, FAULTS[name], None, FAULTS[name]]
    answers, usage = ask(server, timeout=0.5 if name == "hangs" else 30.0)
    assert answers == [[right] for right in RIGHT]
    assert usage.requests == 6 + usage.retries
    # On a busy machine half a second may pass without a hang.
    assert usage.retries == 2 or (name == "hangs" and usage.retries > 2)


@pytest.mark.parametrize("name", ["broken", "resets", "no JSON"])
def test_a_fault_that_lasts_ends_the_run_in_one_line(server, name):
    server.script = [FAULTS[name]] * 1000
    with pytest.raises(ValueError, match=r"/v1 failed 4 times \(") as error:
        ask(server, max_retries=3, concurrency=1)
    assert "\n" not in str(error.value) and len(server.bodies) == 4


def test_tries_come_later_and_later(server):
    server.script = [FAULTS["broken"]] * 4
    ask(server, prompts=PROMPTS[:1], backoff=0.08)
    pauses = [b - a for a, b in zip(server.times, server.times[1:])]
    # At least half of 0.08, 0.16, 0.32, 0.64 s; a busy machine adds to it.
    assert all(pause >= 0.04 * 2**i for i, pause in enumerate(pauses))


@pytest.mark.parametrize("as_date", [False, True])
def test_all_requests_wait_where_the_server_says_how_long(server, as_date):
    """A date is in whole seconds: one of 2 s ahead is 1 to 2 s away."""
    said = email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "0.6"
    server.script = [openai_server.status(429, Retry_After=said)]
    ask(server, concurrency=1, backoff=0.0)
    assert server.times[1] - server.times[0] >= 0.6
    # The pause is the client's, not the request's: another thread waits too.
    server.times.clear()
    server.script = [openai_server.status(429, Retry_After="0.6"), openai_server.hang(0.3), None]
    ask(server, prompts=PROMPTS[:2], concurrency=2, backoff=0.0)
    assert min(server.times[2:]) - server.times[0] >= 0.6


def test_a_server_that_wants_an_hour_is_not_waited_for(server):
    server.script = [openai_server.status(429, "quota exceeded", Retry_After="3600")]
    with pytest.raises(ValueError, match=r"quota exceeded\), and asks for 3600 s"):
        ask(server, concurrency=1)
    assert len(server.bodies) == 1


def test_requests_a_minute_are_kept_with_many_threads(server):
    server.script = [None, FAULTS["broken"]]
    ask(server, requests_per_minute=1200, concurrency=6)  # one each 50 ms
    times = sorted(server.times)
    assert len(times) == 7
    # Starts are spaced at the client; a thread may be late to send, so the whole is measured.
    assert times[-1] - times[0] >= 6 * 0.05 - 0.03


def test_a_refused_question_is_told_and_the_others_are_answered(server):
    too_long = openai_server.status(400, "maximum context length is 4096 tokens")
    server.script = [None, None, None, too_long]
    answers, usage = ask(server, concurrency=1)
    refused = answers[3][0]
    assert refused.refused == "status 400: maximum context length is 4096 tokens"
    assert [row[0] for i, row in enumerate(answers) if i != 3] == RIGHT[:3] + RIGHT[4:]
    assert usage.retries == 0


def test_a_stopped_run_does_not_wait_for_a_server_that_hangs(server):
    server.script = [openai_server.hang(20.0)] * 4 + [openai_server.status(401)]
    began = time.monotonic()
    with pytest.raises(ValueError, match="status 401"):
        ask(server, concurrency=5, timeout=30.0)
    assert time.monotonic() - began < 15


# --------------------------------------------------------------------- before anything is asked


def check(server, **changes):
    with pytest.raises(ValueError) as error:
        client(server, **changes).check()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_server_that_has_the_model_is_asked_for_its_list_alone(server):
    client(server).check()
    assert not server.bodies


@pytest.mark.parametrize("models", [None, [], ["teacher-70b"]])
def test_without_a_list_or_a_name_on_it_one_token_is_asked_for(server, models):
    """A name that is not listed may be an alias."""
    server.models, server.answer = models, lambda body: [choice("H", finish="length")]
    client(server).check()
    assert [body["max_tokens"] for body in server.bodies] == [1]


def test_an_unknown_model_is_named_with_the_known_ones(server):
    said = check(server, model_name="gpt-9")
    assert "server.model_name is 'gpt-9'" in said and f"it lists {MODEL}" in said
    assert "is the URL right, up to its version (/v1)?" in check(
        server, url=server.url.removesuffix("/v1")
    )


def test_a_dead_url_is_found_at_once():
    with socket.socket() as free:  # bound, not listening
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(ValueError, match=r"server\.url is '.*'; no server answers there"):
            Remote(ServerConfig(url=url, model_name=MODEL)).check()


def test_a_server_that_says_nothing_is_found(server, monkeypatch):
    monkeypatch.setattr(
        openai_server._Handler, "do_GET", lambda handler: openai_server.hang(2.0)(handler, {})
    )
    assert "no answer in 0.3 s" in check(server, timeout=0.3)


def test_the_key_is_the_environments_and_is_never_said(server, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("HOME", str(tmp_path))  # requests would take this one instead
    server.key = "sk-secret"
    assert "a request without a key (server.key_variable)" in check(server)
    monkeypatch.setenv("TEACHER_KEY", "sk-wrong")
    said = check(server, key_variable="TEACHER_KEY")
    assert "the key of $TEACHER_KEY: status 401" in said and "Bearer ***" in said
    assert "sk-" not in said
    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    right = client(server, key_variable="TEACHER_KEY")
    right.check()
    assert right.ask(PROMPTS, Sampling(max_tokens=8)) == [[r] for r in RIGHT]
    assert "sk-" not in repr(right.config)


def test_a_moved_server_is_not_followed(server):
    server.models = None
    server.script = [openai_server.status(301, "moved", Location="https://elsewhere/v1")]
    assert "answers 301; it points to https://elsewhere/v1" in check(server)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"url": "localhost:8000"}, r"server\.url is 'localhost:8000'; it must begin with http"),
        ({"model_name": ""}, r"server\.model_name is empty"),
        ({"endpoint": "responses"}, r"server\.endpoint is 'responses'; .* chat, completions"),
        ({"concurrency": 0}, r"server\.concurrency is 0; at least 1"),
        ({"samples_per_request": 0}, r"server\.samples_per_request is 0; at least 1"),
        ({"max_retries": -1}, r"server\.max_retries is -1; at least 0"),
        ({"requests_per_minute": -1.0}, r"server\.requests_per_minute is -1\.0"),
        ({"timeout": 0.0}, r"server\.timeout is 0\.0"),
        ({"key_variable": "NO_SUCH_KEY"}, r"server\.key_variable is 'NO_SUCH_KEY'; the environ"),
    ],
)
def test_what_cannot_be_is_named(changes, says):
    with pytest.raises(ValueError, match=says):
        ServerConfig(**{"url": "http://x/v1", "model_name": MODEL, **changes})
