"""A server in a thread that speaks OpenAI's protocol, and has the faults of a real one."""

import contextlib
import http.server
import json
import socket
import struct
import threading
import time
from collections.abc import Callable

MODEL = "teacher-8b"


def choice(content, reasoning=None, finish="stop", field="reasoning_content") -> dict:
    message = {"role": "assistant", "content": content}
    if reasoning is not None:
        message[field] = reasoning
    return {"index": 0, "message": message, "finish_reason": finish}


class Server(http.server.ThreadingHTTPServer):
    """Answers by `answer(body) -> choices`, after the faults of `script`, one a POST.

    A fault is called with the handler and the body; `None` is none.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[dict], list[dict]]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.script = answer, []
        self.models: list[str] | None = [MODEL]  # None: the server has no list
        self.key = ""  # asked for, where there is one
        self.bodies: list[dict] = []
        self.times: list[float] = []
        self.active = self.most_active = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that has gone


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, status: int, content, headers=()) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def refused(self) -> bool:
        key = self.server.key
        if not key or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        given = self.headers.get("Authorization", "nothing")
        self.send(401, {"error": {"message": f"Incorrect API key provided: {given}"}})
        return True

    def do_GET(self):
        if self.refused():
            return
        if self.path != "/v1/models" or self.server.models is None:
            self.send(404, {"detail": "Not Found"})
            return
        self.send(200, {"object": "list", "data": [{"id": m} for m in self.server.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        server = self.server
        with server.lock:
            server.bodies.append({**body, "path": self.path})
            server.times.append(time.monotonic())
            server.active += 1
            server.most_active = max(server.most_active, server.active)
            fault = server.script.pop(0) if server.script else None
        try:
            if fault is not None:
                fault(self, body)
            elif not self.path.startswith("/v1/"):
                self.send(404, {"detail": "Not Found"})
            elif body["model"] != MODEL:
                message = f"The model `{body['model']}` does not exist."
                self.send(404, {"error": {"message": message, "code": 404}})
            else:
                choices = server.answer(body)
                usage = {"prompt_tokens": 10, "completion_tokens": 7 * len(choices)}
                self.send(200, {"object": "chat.completion", "choices": choices, "usage": usage})
        finally:
            with server.lock:
                server.active -= 1


def status(code: int, message: str = "try later", **headers: str):
    """An error with a body as OpenAI's."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, body: handler.send(code, {"error": {"message": message}}, named)


def raw(content: bytes):
    """Status 200 with any body."""
    return lambda handler, body: handler.send(200, content)


def hang(seconds: float):
    """Says nothing for so long, then goes."""

    def fault(handler, body):
        time.sleep(seconds)
        handler.close_connection = True

    return fault


def reset(handler, body):
    """The connection is gone: the peer hears RST, not the end of a stream."""
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.connection.close()
    handler.close_connection = True


def cut_off(handler, body):
    """Half of the body that Content-Length promises."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"index": 0, "message": {"content": "4')
    handler.close_connection = True


@contextlib.contextmanager
def serving(answer: Callable[[dict], list[dict]]):
    server = Server(answer)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
