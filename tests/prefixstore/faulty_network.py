"""Network faults between an HTTP client and server: a faulty proxy, and scripted answers."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyProxy:
    """Forwards connections to a port of this machine until it is closed.

    Attributes:
        latency_s: How long the beginning of each answer is delayed.
        bytes_per_s: How fast answers pass; None for no limit.
        cut_after: After how many bytes of its answers a connection is cut; None for never.
        num_cuts: How many connections are still to be cut.
        num_accepted: Connections so far.
    """

    def __init__(self, port: int) -> None:
        self.latency_s = 0.0
        self.bytes_per_s: int | None = None
        self.cut_after: int | None = None
        self.num_cuts = 1 << 30
        self.num_accepted = 0
        self._slowed: set[socket.socket] = set()  # open, and asked while answers passed slowly
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._is_closed.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def wait_until_given_up(self, timeout_s: float) -> bool:
        """Whether all connections with requests while answers passed slowly end by then.

        Others may stay open, since a client keeps idle connections.
        """
        end = time.monotonic() + timeout_s
        while self._slowed and time.monotonic() < end:
            time.sleep(0.01)
        return not self._slowed

    def _accept(self) -> None:
        while not self._is_closed.is_set():
            if select.select([self._listener], [], [], 0.02)[0]:
                client, _ = self._listener.accept()
                self.num_accepted += 1
                self._threads.append(threading.Thread(target=self._serve, args=(client,)))
                self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, socket.create_connection(("127.0.0.1", self._target)) as server:
                self._forward(client, server)
        except OSError:
            pass  # one side has closed, so this connection ends
        finally:
            self._slowed.discard(client)

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        num_answered, is_asked = 0, False
        while not self._is_closed.is_set():
            readable, _, _ = select.select([client, server], [], [], 0.02)
            if client in readable:
                data = client.recv(65536)
                if not data:
                    return
                server.sendall(data)
                is_asked = True
                if self.bytes_per_s is not None:
                    self._slowed.add(client)
            if server in readable:
                self._is_closed.wait(self.latency_s if is_asked else 0.0)
                is_asked = False
                data = server.recv(self._piece_bytes())
                left = self._bytes_before_cut(num_answered, len(data))
                client.sendall(data[:left])
                num_answered += len(data)
                if not data or left is not None:
                    return

    def _piece_bytes(self) -> int:
        bytes_per_s = self.bytes_per_s
        if bytes_per_s is None:
            return 65536
        self._is_closed.wait(0.01)
        return max(1, bytes_per_s // 100)

    def _bytes_before_cut(self, num_answered: int, num_bytes: int) -> int | None:
        """How many of these bytes pass before the connection is cut; None if it is not."""
        with self._lock:
            cut_after = self.cut_after
            if cut_after is None or num_answered + num_bytes < cut_after or self.num_cuts == 0:
                return None
            self.num_cuts -= 1
            return max(0, cut_after - num_answered)


Answer = tuple[int, dict[str, str], bytes]


class ScriptedServer:
    """Answers each request with the next answer of its script, or else with `answer`.

    Attributes:
        script: Status, headers and body of the next answers.
        answer: Makes an answer from method, path and headers; None leaves the request waiting.
        requests: Method, path and time of all requests.
    """

    def __init__(self) -> None:
        self.script: deque[Answer] = deque()
        self.answer: Callable[[str, str, dict[str, str]], Answer | None] = lambda *_: (404, {}, b"")
        self.requests: list[tuple[str, str, float]] = []
        self._is_closed = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._make_handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._is_closed.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _make_handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def serve(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                owner.requests.append((self.command, self.path, time.monotonic()))
                if owner.script:
                    answer: Answer | None = owner.script.popleft()
                else:
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    answer = owner.answer(self.command, self.path, headers)
                if answer is None:
                    owner._is_closed.wait()
                    self.close_connection = True
                    return
                status, headers, body = answer
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = serve

            def log_message(self, *args: object) -> None:
                pass

        return Handler
