"""Kernels on their own threads: the right number, the same bits, and only inside the block."""

import os
import re
import subprocess
import sys
import threading

import pytest
import torch

import kvkernels
from kvkernels.threads import num_threads, own_threads


@pytest.fixture(autouse=True)
def _three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def apply_layer() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(40, 256, generator=generator), torch.randn(512, 256)
    weight.normal_(generator=generator)
    return kvkernels.linear(rows, weight)


def test_kernels_keep_the_number_and_pytorch_gets_one():
    with own_threads():
        assert num_threads() == 3
        assert torch.get_num_threads() == 1
    assert num_threads() == torch.get_num_threads() == 3


def mkl_threads() -> int:
    found = re.search(r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    return int(found[1])


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="PyTorch was built without MKL")
def test_mkl_too_computes_with_one_thread():
    """MKL keeps its own number of threads once PyTorch's was set."""
    seen = []
    with own_threads():
        assert mkl_threads() == 1
        thread = threading.Thread(target=lambda: seen.append(mkl_threads()))
        thread.start()
        thread.join()
    assert seen == [3]
    assert mkl_threads() == 3
    torch.set_num_threads(2)
    assert mkl_threads() == 2


def test_blocks_within_blocks_end_with_the_outermost():
    with own_threads():
        with own_threads():
            assert (num_threads(), torch.get_num_threads()) == (3, 1)
        assert (num_threads(), torch.get_num_threads()) == (3, 1)
    assert torch.get_num_threads() == 3


def test_an_error_gives_the_threads_back():
    with pytest.raises(KeyError), own_threads():
        raise KeyError
    assert num_threads() == torch.get_num_threads() == 3


def test_other_threads_are_not_concerned():
    seen = []

    def look() -> None:
        seen.append((num_threads(), torch.get_num_threads()))

    with own_threads():
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == [(3, 3)]


def test_results_are_the_same_bits():
    expected = apply_layer()
    for _ in range(50):
        with own_threads():
            assert torch.equal(apply_layer(), expected)


def test_several_callers_at_once_get_their_results():
    expected = apply_layer()
    wrong = []

    def call_often() -> None:
        with own_threads():
            wrong.extend(not torch.equal(apply_layer(), expected) for _ in range(50))

    threads = [threading.Thread(target=call_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 200
    assert not any(wrong)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_threads_of_its_own():
    expected = apply_layer()
    with own_threads():
        apply_layer()  # starts the parent's threads
    child = os.fork()
    if child == 0:
        is_equal = False
        try:
            with own_threads():
                is_equal = torch.equal(apply_layer(), expected)
        finally:
            os._exit(0 if is_equal else 1)
    assert os.waitpid(child, 0)[1] == 0


FORKS_EARLY = """
import os, signal, torch, kvkernels
torch.set_num_threads(2)
rows, weight = torch.ones(64, 1024), torch.ones(2048, 1024)
weight.exp()  # PyTorch's threads are there, kvkernels has not run yet
child = os.fork()
if child == 0:
    signal.alarm(30)
    kvkernels.linear(rows, weight)
    os._exit(0)
raise SystemExit(os.waitpid(child, 0)[1])
"""


def test_a_child_forked_before_the_first_kernel_does_not_hang():
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS_EARLY], capture_output=True, check=False
    )
    assert process.returncode == 0, process.stderr.decode()
