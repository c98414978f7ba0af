"""How the attention ops behave inside PyTorch and in a forked process."""

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from test_attention_checks import good_inputs, ints, merge_inputs
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import kvkernels
from kvkernels import native
from kvkernels.checks import needs_dispatcher


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("window", [0, 7])
def test_paged_attention_is_registered_as_pytorch_expects(return_lse: bool, window: int) -> None:
    args = (*good_inputs().values(), *(0.2, True, window, 0.0, None, None, None, [], []))
    args += (return_lse, False)
    torch.library.opcheck(torch.ops.kvkernels.paged_attention.default, args)


def test_merge_attention_is_registered_as_pytorch_expects() -> None:
    args = tuple(merge_inputs().values())
    torch.library.opcheck(torch.ops.kvkernels.merge_attention.default, args)


def test_compiles_into_one_graph() -> None:
    def step(key: torch.Tensor, slots: torch.Tensor, inputs: dict) -> tuple:
        kvkernels.store_kv(key, key + 1, inputs["key_cache"], inputs["value_cache"], slots)
        whole = kvkernels.paged_attention(**inputs, return_lse=True)
        recent = kvkernels.paged_attention(**inputs, window=3, return_lse=True)
        return kvkernels.merge_attention(*whole, *recent)

    key, slots = torch.randn(2, 2, 32), torch.tensor([3, 40])
    inputs = good_inputs()
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    expected = step(key, slots, copies)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(key, slots, inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert torch.equal(inputs["key_cache"], copies["key_cache"])


class SeenOps(TorchDispatchMode):
    """Lists the ops that pass PyTorch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    """Lists the functions of PyTorch's that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(getattr(func, "name", lambda: func)()))
        return func(*args, **(kwargs or {}))


def store(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    key, slots = torch.ones(2, 2, 32), torch.tensor([3, 40])
    caches = (inputs["key_cache"].clone(), inputs["value_cache"].clone())
    kvkernels.store_kv(key, key + 1, *caches, slots)
    return torch.stack(caches)


def attend(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return kvkernels.paged_attention(**inputs)


def merge(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return kvkernels.merge_attention(**merge_inputs())[0]


CALLS = [("store_kv", store), ("paged_attention", attend), ("merge_attention", merge)]


@pytest.mark.parametrize(("op", "call"), CALLS)
def test_modes_and_the_profiler_see_the_op(op, call) -> None:
    """Though it skips PyTorch's dispatcher otherwise, with the same result."""
    inputs, name = good_inputs(), f"kvkernels::{op}"
    torch.manual_seed(0)
    expected = call(inputs)  # with gradients enabled, through the dispatcher
    with torch.no_grad():
        torch.manual_seed(0)
        assert torch.equal(call(inputs), expected)
        with SeenOps() as ops:
            call(inputs)
        with SeenFunctions() as functions:
            call(inputs)
        with torch.profiler.profile() as profile:
            call(inputs)
    assert name in ops.names and name in functions.names
    assert name in {event.name for event in profile.events()}


@pytest.mark.skipif(not native.is_available, reason="needs the C++ extension")
@pytest.mark.parametrize(("op", "call"), CALLS)
def test_skips_the_dispatcher_without_gradients(op, call, monkeypatch) -> None:
    def refuse(op: object, *_: object, **__: object) -> None:
        raise AssertionError(f"went through the dispatcher: {op}")

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", refuse)
    with pytest.raises(AssertionError, match=op):
        call(good_inputs())
    with torch.inference_mode():
        call(good_inputs())


def seen_by_vmap(ask: Callable[[], bool]) -> bool:
    answers = []

    def look(row: torch.Tensor) -> torch.Tensor:
        answers.append(ask())
        return row

    torch.func.vmap(look)(torch.ones(2, 3))
    return answers == [True]


def seen_by_a_trace(ask: Callable[[], bool]) -> bool:
    answers = []

    def look(row: torch.Tensor) -> torch.Tensor:
        answers.append(ask())
        return row

    torch.jit.trace(look, torch.ones(3), check_trace=False)
    return answers == [True]


def seen_inside(context: Callable[[], AbstractContextManager]) -> Callable:
    def see(ask: Callable[[], bool]) -> bool:
        with context():
            return ask()

    return see


WATCHERS = {
    "gradients": seen_inside(torch.enable_grad),
    "tangents": seen_inside(torch.autograd.forward_ad.dual_level),
    "dispatch mode": seen_inside(SeenOps),
    "function mode": seen_inside(SeenFunctions),
    "profiler": seen_inside(torch.profiler.profile),
    "vmap": seen_by_vmap,
    "trace": seen_by_a_trace,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("see", WATCHERS.values(), ids=WATCHERS)
@torch.no_grad()
def test_python_and_cpp_know_who_needs_the_dispatcher(see: Callable) -> None:
    ways = [needs_dispatcher]
    if native.is_available:
        ways.append(native.extension.needs_dispatcher)
    for ask in ways:
        assert not ask()
        assert see(ask)
        assert not ask()


@pytest.mark.skipif(not native.is_available, reason="needs the C++ extension")
def test_cpp_finds_the_functions_of_this_pytorch() -> None:
    assert native.knows_dispatcher


def run_layers(
    query: torch.Tensor,
    caches: list[tuple[torch.Tensor, torch.Tensor]],
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
) -> torch.Tensor:
    """Each layer stores its input, attends to it, and passes both to the next."""
    for key_cache, value_cache in caches:
        key = query[:, :2].contiguous()
        kvkernels.store_kv(key, key + 1, key_cache, value_cache, slots)
        tables = (torch.tensor([[2, 0]], dtype=torch.int32), seq_lens, cu_seqlens_q)
        query = query + kvkernels.paged_attention(query, key_cache, value_cache, *tables)
    return query


def run_pool(query: torch.Tensor, data: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
    caches = [(data[:, layer, 0], data[:, layer, 1]) for layer in range(data.shape[1])]
    return run_layers(query, caches, *tables)


@pytest.mark.parametrize(
    ("takes_views", "dynamic"),
    [(True, False), (False, False), (False, True)],
    ids=["views", "data", "data_dynamic"],
)
def test_compiles_layers_of_one_pool_into_one_graph(takes_views: bool, dynamic: bool) -> None:
    layout = kvkernels.KVLayout(3, num_kv_heads=2, head_dim=16, block_size=16, dtype=torch.float32)
    pool, eager = kvkernels.KVPool(layout, num_blocks=3), kvkernels.KVPool(layout, num_blocks=3)
    pool.data.fill_(torch.nan)
    eager.data.fill_(torch.nan)
    layers = range(layout.num_layers)
    views = [(pool.key_cache(layer), pool.value_cache(layer)) for layer in layers]
    step, caches = (run_layers, views) if takes_views else (run_pool, pool.data)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    start = 0
    for num_tokens in (14, 5, 1, 1):  # the second step crosses into another block
        query = torch.randn(num_tokens, 4, 16)
        end = start + num_tokens
        positions = torch.arange(start, end)
        slots = torch.tensor([2, 0])[positions // 16] * 16 + positions % 16
        tables = (slots, ints(end), ints(0, num_tokens))
        expected = run_pool(query, eager.data, *tables)
        assert torch.equal(compiled(query, caches, *tables), expected)
        torch.testing.assert_close(pool.data, eager.data, rtol=0, atol=0, equal_nan=True)
        assert (~pool.data.isnan()).sum() == end * 3 * 2 * 2 * 16
        start = end


@pytest.mark.skipif(not native.is_available, reason="the reference has no threads of its own")
def test_works_in_a_forked_child() -> None:
    inputs = good_inputs() | {
        "key_cache": torch.randn(130, 2, 16, 32),
        "value_cache": torch.randn(130, 2, 16, 32),
        "block_table": torch.arange(130, dtype=torch.int32).view(2, 65),
        "seq_lens": ints(1000, 1040),  # enough for a second thread
    }
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = kvkernels.paged_attention(**inputs)  # starts the parent's threads
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # waiting for a thread that did not survive the fork would never end
            same = torch.equal(kvkernels.paged_attention(**inputs), expected)
            os.write(write_end, b"same" if same else b"other")
            os._exit(0)
        os.close(write_end)
        _, status = os.waitpid(child, 0)
        answer = os.read(read_end, 16)
        os.close(read_end)
    finally:
        torch.set_num_threads(num_threads)
    assert (status, answer) == (0, b"same")
