"""Processes of their own that serve a scripted engine until a signal, or a part of that."""

import json
import os
import signal
import sys
from pathlib import Path

from chat_model import chat_tokenizer
from scripted_engine import ScriptedEngine

from prefixstore.server.app import create_app
from prefixstore.server.config import ServerConfig
from prefixstore.server.lifecycle import Lifecycle
from prefixstore.server.request_log import log_json_lines
from prefixstore.server.run import DrainingServer, bind_address, serve_until_signal


def write_until_signal(log: Path) -> None:
    """Writes to its standard error, the pipe `log`, more than anyone reads; ends by a signal.

    It is as far as a server whose first signal has not come through: one is enough.
    """
    sys.stderr = log.open("w")  # buffered, whatever PYTHONUNBUFFERED says
    server = object.__new__(DrainingServer)
    server._lifecycle, server._loop = Lifecycle(), None
    signal.signal(signal.SIGTERM, server.handle_exit)
    sys.stderr.buffer.write(b"x" * (1 << 20))


def serve(out: Path, log: Path, engine: dict, server: dict) -> None:
    """What it prints goes to the file `out`, and what it logs to `log`.

    After the signal SIGUSR1 the engine's steps take no time.
    """
    for number, path in ((1, out), (2, log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    engine = ScriptedEngine(chat_tokenizer(), **engine)
    signal.signal(signal.SIGUSR1, lambda *_: setattr(engine, "step_s", 0.0))
    config = ServerConfig(port=0, model_name="tiny", **server)
    log_json_lines()
    listener = bind_address(config)
    serve_until_signal(create_app(engine, config), engine, config, listener)
    print(json.dumps({"was_flushed": engine.was_flushed, "was_closed": engine.is_closed}))
