"""Models that several threads install kvkernels in at once: each is done, and undone, once."""

import sys
import threading
import time

import pytest
import tiny_models
import torch

from kvkernels.nn.batch_invariance import batch_invariant
from kvkernels.nn.forward_patch import ForwardPatch
from kvkernels.nn.transformers import paged_attention


@pytest.fixture
def _eager_switches():
    """Threads take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def run_in_threads(function, num_threads=2):
    """Call it in several threads at once; the errors they end with."""
    barrier, errors = threading.Barrier(num_threads), []

    def run():
        barrier.wait()
        try:
            function()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_layers_stay_replaced_until_the_last_thread_is_done():
    def find(model):
        time.sleep(0.05)  # long enough for all to come
        return {model: model.forward}

    patch, model = ForwardPatch(find), torch.nn.Linear(2, 2)
    assert not run_in_threads(lambda: patch.install(model), num_threads=3)
    assert [patch.uninstall(model) for _ in range(2)] == [False, False]
    assert "forward" in vars(model)
    assert patch.uninstall(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("serve", [paged_attention, batch_invariant])
@pytest.mark.usefixtures("_eager_switches")
def test_threads_that_come_and_go_leave_the_model_as_it_was(serve):
    model = tiny_models.llama()
    before = model.config._attn_implementation

    def come_and_go():
        with serve(model):
            pass

    for _ in range(50):
        assert not run_in_threads(come_and_go)
        assert model.config._attn_implementation == before
        assert not any("forward" in vars(module) for module in model.modules())
