"""Servers that answer what a test wants: for replies and failures that a real SGLang does not give on demand."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

Reply = tuple[int, bytes]  # a status and a body
Served = tuple[str, list[str]]  # the server's URL, and the paths that it was asked for


@contextmanager
def server(reply: Callable[[str, str, bytes], Reply]) -> Iterator[Served]:
    """A server that answers with `reply(method, path, body)`, called in a thread of each request."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer("GET", b"")

        def do_POST(self) -> None:
            self.answer("POST", self.rfile.read(int(self.headers["Content-Length"])))

        def answer(self, method: str, sent: bytes) -> None:
            asked.append(self.path)
            status, body = reply(method, self.path, sent)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}", asked
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


@contextmanager
def fake_server(body: bytes, status: int = 200, version: str = "0") -> Iterator[Served]:
    """One that answers every POST with the same bytes, and says that it is healthy and has the weights `version`."""
    healthy = f'{{"weight_version": "{version}"}}'.encode()
    with server(lambda method, *_: (200, healthy) if method == "GET" else (status, body)) as served:
        yield served


@contextmanager
def between(url: str, instead: Callable[[str], Reply | None]) -> Iterator[Served]:
    """One that passes everything on to the server at `url`, but that for which `instead(path)` has an answer."""
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:

        def reply(method: str, path: str, sent: bytes) -> Reply:
            other = instead(path)
            if other is not None:
                return other
            headers = {"Content-Type": "application/json"}
            response = client.request(method, path, content=sent, headers=headers)
            return response.status_code, response.content

        with server(reply) as served:
            yield served
