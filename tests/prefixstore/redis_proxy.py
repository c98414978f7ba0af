"""A proxy that is slow or cuts connections, and a server that sends a byte now and then."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time


class Proxy:
    """Forwards connections to a port of this machine, in a thread, until it is closed.

    Attributes:
        bytes_per_s: How fast replies pass; None for no limit.
        cut_replies_at: After so many bytes of replies on all connections together, the current
            one is closed, once; None for never.
        cut_commands_at: The same for commands.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self.bytes_per_s: int | None = None
        self.cut_replies_at: int | None = None
        self.cut_commands_at: int | None = None
        self.num_connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._is_closed = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._is_closed.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._is_closed.is_set():
            if select.select([self._listener], [], [], 0.02)[0]:
                client, _ = self._listener.accept()
                self.num_connections += 1
                thread = threading.Thread(target=self._serve, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target)) as server:
            try:
                self._forward(client, server)
            except OSError:
                return  # one side has closed, so this connection ends

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        while not self._is_closed.is_set():
            readable, _, _ = select.select([client, server], [], [], 0.02)
            for side in readable:
                data = side.recv(self._chunk_bytes(side is server))
                if not data:
                    return
                (client if side is server else server).sendall(data)
                if self._is_cut(side is server, len(data)):
                    return

    def _chunk_bytes(self, is_reply: bool) -> int:
        bytes_per_s = self.bytes_per_s
        if not is_reply or bytes_per_s is None:
            return 4096
        time.sleep(0.01)
        return max(1, bytes_per_s // 100)

    def _is_cut(self, is_reply: bool, num_bytes: int) -> bool:
        name = "cut_replies_at" if is_reply else "cut_commands_at"
        left = getattr(self, name)
        if left is None:
            return False
        setattr(self, name, left - num_bytes if left > num_bytes else None)
        return left <= num_bytes


class Trickle:
    """Sends each client a byte now and then, of a reply without an end, for a while.

    Args:
        start: The beginning of the reply.
    """

    NUM_BYTES = 30
    PAUSE_S = 0.1

    def __init__(self, start: bytes) -> None:
        self._start = start
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._is_closed = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._is_closed.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._is_closed.is_set():
            if select.select([self._listener], [], [], 0.02)[0]:
                thread = threading.Thread(target=self._serve, args=(self._listener.accept()[0],))
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):  # the client has gone
            client.sendall(self._start)
            for _ in range(self.NUM_BYTES):
                if self._is_closed.wait(self.PAUSE_S):
                    return
                client.sendall(b"x")
