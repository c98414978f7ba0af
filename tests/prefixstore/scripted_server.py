"""Functions run as processes: a server on a scripted engine until a signal, or a part of that."""

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
    """Write more to standard error, the pipe `log`, than is read; ends by a signal.

    Like a server blocked before it handles its first signal: that one signal must be enough.
    """
    sys.stderr = log.open("w")  # buffered, whatever PYTHONUNBUFFERED says
    server = object.__new__(DrainingServer)
    server._lifecycle, server._loop = Lifecycle(), None
    signal.signal(signal.SIGTERM, server.handle_exit)
    sys.stderr.buffer.write(b"x" * (1 << 20))


def serve(out: Path, log: Path, engine: dict, server: dict) -> None:
    """Serve; prints go to the file `out`, and the log to `log`.

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
