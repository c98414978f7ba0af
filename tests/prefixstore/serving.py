"""A server in this process, on a port that the kernel chose, and raw HTTP to it."""

import json
import signal
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import openai

from prefixstore.server.app import create_app
from prefixstore.server.config import ServerConfig
from prefixstore.server.run import DrainingServer, bind_address

MODEL = "tiny"
PATHS = ("/v1/chat/completions", "/v1/completions")
# The smallest valid body of each endpoint.
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
TEXT = {"model": MODEL, "prompt": "Hello"}


@dataclass
class Running:
    """A running server, and its engine."""

    engine: object
    app: object
    host: str
    port: int
    server: object

    @property
    def url(self):
        return f"http://{self.host}:{self.port}"

    def client(self, key="unused", **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def async_client(self, key="unused", **options):
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def post(self, path, body, **options):
        return httpx.post(self.url + path, json=body, timeout=30, **options)

    def get(self, path, **options):
        return httpx.get(self.url + path, timeout=30, **options)

    def connect(self, timeout_s=10):
        return socket.create_connection((self.host, self.port), timeout_s)

    def begin_ending(self):
        """Begin the shutdown, as SIGTERM does."""
        self.server.handle_exit(signal.SIGTERM, None)

    def assert_answers(self):
        assert self.get("/health/ready").status_code == 200
        body = {"model": MODEL, "prompt": "A block", "max_tokens": 2}
        assert self.post("/v1/completions", body).status_code == 200


@contextmanager
def serving(engine, **settings):
    """Serves `engine` until the block ends; the engine is the caller's to close."""
    config = ServerConfig(port=0, **{"model_name": MODEL, **settings})
    listener = bind_address(config)
    host, port = listener.getsockname()[:2]
    app = create_app(engine, config)
    server = DrainingServer(app, engine, config, listener)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Running(engine, app, host, port, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wait_until(condition, timeout_s=10):
    """Wait for a condition that another thread or process brings about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def in_thread(function):
    """Run `function` in a thread; its result is the last element of the list."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    return thread, results


def request_bytes(path, body, *headers, method="POST"):
    """A request as it goes over the wire."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", "content-type: application/json"]
    lines += [f"content-length: {len(content)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def read_all(connection):
    """All bytes until the server closes the connection or resets it."""
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received
