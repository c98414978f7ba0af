"""Run as a program: serves a scripted engine until a signal; settings as JSON in argv[1]."""

import json
import sys

from chat_model import chat_tokenizer
from scripted_engine import ScriptedEngine

from prefixstore.server.app import create_app
from prefixstore.server.config import ServerConfig
from prefixstore.server.request_log import log_json_lines
from prefixstore.server.run import listen, serve_until_signal


def main():
    settings = json.loads(sys.argv[1])
    engine = ScriptedEngine(chat_tokenizer(), **settings["engine"])
    config = ServerConfig(port=0, model_name="tiny", **settings["server"])
    log_json_lines()
    listener = listen(config)
    serve_until_signal(create_app(engine, config), engine, config, listener)
    print(json.dumps({"was_flushed": engine.was_flushed, "was_closed": engine.is_closed}))


if __name__ == "__main__":
    main()
