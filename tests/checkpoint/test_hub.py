"""hf:// against a hub of one repository in this process: online, offline, and out of reach."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import subprocess
import sys
import threading

import pytest

from jaxreason.checkpoint import hub

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "qwen3"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": bytes(1000),
    "pytorch_model.bin": b"a pickle",
    "onnx/config.json": b"another format",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub: the revision, the tree, and files by HEAD and GET."""

    asked: list[str]

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body: bool = True):
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if (match := re.fullmatch(r"/api/models/org/(\w+)/revision/([\w.]+)", path)) is not None:
            name, revision = match.groups()
            if name == "gated":
                return self._answer(403, {}, {"X-Error-Code": "GatedRepo"}, body)
            if name != "tiny":
                return self._answer(404, {}, {"X-Error-Code": "RepoNotFound"}, body)
            if revision not in ("main", "v1", COMMIT):
                return self._answer(404, {}, {"X-Error-Code": "RevisionNotFound"}, body)
            siblings = [{"rfilename": file} for file in FILES]
            return self._answer(
                200, {"id": "org/tiny", "sha": COMMIT, "siblings": siblings}, {}, body
            )
        if path.startswith(f"/api/models/org/tiny/tree/{COMMIT}"):
            tree = [{"type": "file", "path": file, "size": len(data), "oid": etag(data)}
                    for file, data in FILES.items()]  # fmt: skip
            return self._answer(200, tree, {}, body)
        file = path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
        if file in FILES:
            headers = {"ETag": f'"{etag(FILES[file])}"', "X-Repo-Commit": COMMIT}
            return self._answer(200, FILES[file], headers, body)
        return self._answer(404, {}, {"X-Error-Code": "EntryNotFound"}, body)

    def _answer(self, status: int, content, headers: dict, body: bool) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        """Silent."""


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextlib.contextmanager
def running_hub():
    Hub.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


RESOLVE = """
import sys
from jaxreason.checkpoint import hub
for address in sys.argv[2:]:
    try:
        print(hub.resolve(address, weights=sys.argv[1] == "True"))
    except ValueError as error:
        print("error:", error)
"""


def resolved(
    endpoint: str, cache: pathlib.Path, *addresses: str, weights: bool = True, **environment: str
) -> list[str]:
    """One line an address. A new process: huggingface_hub reads the environment as it starts."""
    env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "PATH": "/usr/bin:/bin", **environment}
    run = [sys.executable, "-c", RESOLVE, str(weights), *addresses]
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_online_then_offline_with_the_hub_gone(tmp_path):
    cache = tmp_path / "cache"
    with running_hub() as endpoint:
        lines = resolved(
            endpoint, cache, "hf://org/tiny", "hf://org/tiny@v1", "hf://org/none", "hf://org/gated",
            "hf://org/tiny@v2", "hf://tiny", "hf://org/tiny@", "hf://org/ti ny",
        )  # fmt: skip
        folder = pathlib.Path(lines[0])
        assert folder.is_relative_to(cache) and lines[1] == lines[0]
        # No pickle, no other format; the rest bit for bit.
        wanted = {name: data for name, data in FILES.items() if not name.startswith(("py", "onnx"))}
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == wanted
        assert not any("pytorch_model.bin" in path or "onnx" in path for path in Hub.asked)
        for line, part in zip(
            lines[2:],
            (
                f"hf://org/none: no such repository at {endpoint}, or a private one",
                "hf://org/gated is gated: accept its terms on the hub, then set HF_TOKEN",
                "hf://org/tiny@v2: the repository has no revision 'v2'",
                "'hf://tiny' is no repository; write hf://ORG/NAME or hf://ORG/NAME@REV",
                "'hf://org/tiny@' is no repository",
                "'hf://org/ti ny' is no repository",
            ),
            strict=True,
        ):
            assert part in line
    off = resolved(endpoint, cache, "hf://org/tiny", "hf://org/none", HF_HUB_OFFLINE="1")
    assert off[0] == str(folder)
    assert off[1] == (
        "error: hf://org/none is not in the local cache, and HF_HUB_OFFLINE forbids fetching it"
    )
    gone = resolved(endpoint, cache, "hf://org/tiny", "hf://org/none")
    assert gone[0] == str(folder)
    assert f"hf://org/none is not in the local cache, and {endpoint} is out of reach" in gone[1]


def test_a_tokenizer_is_fetched_without_the_weights(tmp_path):
    with running_hub() as endpoint:
        (line,) = resolved(endpoint, tmp_path, "hf://org/tiny", weights=False)
        names = {path.name for path in pathlib.Path(line).iterdir()}
        assert names == {"config.json", "tokenizer.json", "chat_template.jinja"}
        offline = dict(HF_HUB_OFFLINE="1")
        assert resolved(endpoint, tmp_path, "hf://org/tiny", weights=False, **offline) == [line]
        (incomplete,) = resolved(endpoint, tmp_path, "hf://org/tiny", **offline)
        assert "is only in part in the local cache, and HF_HUB_OFFLINE forbids" in incomplete


@pytest.mark.parametrize("text, is_one", [("hf://a/b", True), ("runs/a@b", False), ("a/b", False)])
def test_an_address_is_told_by_its_scheme(text, is_one):
    assert hub.is_address(text) is is_one
