"""A program that exits without closing anything exits cleanly, and keeps what it computed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cached_models import BLOCK_SIZE, tiny_llama
from engines import answer, open_engine, prompt

import prefixstore.at_exit
from prefixstore.at_exit import close_at_exit

HERE = Path(__file__).resolve().parent

PROGRAM = """
import sys
import torch
from cached_models import BLOCK_SIZE, tiny_llama
from engines import GREEDY, Numbers, prompt
from prefixstore.engine import Engine

torch.manual_seed(0)
settings = {"block_size": BLOCK_SIZE, "pool_tokens": 4096, "tiers": [sys.argv[1]]}
engine = Engine.open(tiny_llama(), Numbers(), **settings)
engine.submit(prompt(50 * BLOCK_SIZE), GREEDY).result(60)
engine.submit(prompt(60 * BLOCK_SIZE, 1), GREEDY)  # still running at the end
"""


def test_blocks_of_an_engine_that_nobody_closed_are_kept(tmp_path):
    tier = f"disk://{tmp_path}/blocks?max_bytes=64MiB"
    command = [sys.executable, "-c", PROGRAM, tier]
    path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    torch.manual_seed(0)
    with open_engine(tiny_llama(), tiers=(tier,), restore_policy="load") as engine:
        report = answer(engine, prompt(50 * BLOCK_SIZE)).report
    assert report.reuse.tokens_by_tier["disk"] == 49 * BLOCK_SIZE  # all but the last token's block


@pytest.fixture
def registered(monkeypatch):
    """A separate registry, so that nothing else in the test's process gets closed."""
    methods = {}
    monkeypatch.setattr(prefixstore.at_exit, "_registered", methods)
    return methods


class Closable:
    def __init__(self, names, name, error=None):
        self._names, self._name, self._error = names, name, error
        close_at_exit(self.close)

    def close(self):
        self._names.append(self._name)
        if self._error is not None:
            raise self._error


def test_the_last_is_closed_first_and_one_that_fails_stops_no_other(registered, caplog):
    names = []
    kept = [Closable(names, "a"), Closable(names, "b", OSError("full")), Closable(names, "c")]
    Closable(names, "dead")
    prefixstore.at_exit._close_all()
    assert names == ["c", "b", "a"]
    assert [record.getMessage() for record in caplog.records] == [
        "Closable.close failed at the end of the process"
    ]
    del kept


def test_only_the_process_that_asked_closes(registered):
    names = []
    kept = Closable(names, "parent")
    pid = os.fork()
    if not pid:
        prefixstore.at_exit._close_all()
        os._exit(len(names))
    assert os.waitpid(pid, 0)[1] == 0
    prefixstore.at_exit._close_all()
    assert names == ["parent"]
    del kept


def test_what_is_gone_is_forgotten(registered):
    for name in range(1000):
        Closable([], name)
    assert not registered
