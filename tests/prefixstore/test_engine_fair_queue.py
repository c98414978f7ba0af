"""Turns of tenants: nothing is lost or served twice, and no tenant waits long for others."""

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixstore.engine import fair_queue
from prefixstore.engine.fair_queue import FairQueue
from prefixstore.errors import EngineOverloaded

COSTS = st.integers(1, 50)


def take_all(queue):
    return [queue.pop() for _ in range(len(queue))]


def test_one_request_does_not_wait_for_a_thousand():
    queue = FairQueue(2000)
    for number in range(1000):
        queue.push("many", 100, ("many", number))
    for _ in range(10):
        queue.pop()
    queue.push("few", 5000, "single")
    assert queue.peek() == "single"
    assert queue.pop() == "single"
    assert take_all(queue) == [("many", number) for number in range(10, 1000)]


def test_takes_the_order_of_start_tags():
    queue = FairQueue(10)
    for name in ("a1", "a2", "a3"):
        queue.push("a", 2, name)
    queue.push("b", 1, "b1")
    taken = [queue.pop()]
    queue.push("c", 1, "c1")
    assert taken + take_all(queue) == ["a1", "b1", "c1", "a2", "a3"]


def test_weights_divide_the_service():
    queue = FairQueue(400, weights={"gold": 3})
    for number in range(200):
        queue.push("gold", 10, ("gold", number))
        queue.push("plain", 10, ("plain", number))
    taken = [queue.pop()[0] for _ in range(80)]
    assert taken.count("gold") == 60


def test_a_tenant_saves_nothing_up_while_idle():
    queue = FairQueue(100)
    for number in range(20):
        queue.push("busy", 1, ("busy", number))
    for _ in range(15):
        queue.pop()
    for number in range(5):
        queue.push("back", 1, ("back", number))
    taken = [queue.pop()[0] for _ in range(6)]
    assert 2 <= taken.count("busy") <= 4


@settings(max_examples=200, deadline=None)
@given(
    costs=st.tuples(st.lists(COSTS, min_size=40), st.lists(COSTS, min_size=40)),
    weights=st.tuples(st.sampled_from([0.5, 1.0, 4.0]), st.sampled_from([1.0, 3.0])),
    others=st.lists(COSTS, max_size=20),
)
def test_two_tenants_are_served_alike_while_both_wait(costs, weights, others):
    """The paper's bound, over every stretch in which both have items waiting."""
    queue = FairQueue(1000, weights={"0": weights[0], "1": weights[1]})
    for number, cost in enumerate(others):
        queue.push("other", cost, ("other", number, cost))
    for tenant, of_tenant in enumerate(costs):
        for number, cost in enumerate(of_tenant):
            queue.push(str(tenant), cost, (str(tenant), number, cost))
    left = [len(of_tenant) for of_tenant in costs]
    ahead = [0.0]  # how much more the first was served than the second, after each turn
    while min(left) > 0:
        tenant, _, cost = queue.pop()
        if tenant != "other":
            service = cost / weights[int(tenant)]
            ahead.append(ahead[-1] + (service if tenant == "0" else -service))
            left[int(tenant)] -= 1
    bound = sum(max(one) / weight for one, weight in zip(costs, weights, strict=True))
    assert max(ahead) - min(ahead) <= bound + 1e-9


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from("abcde"), COSTS),
        st.tuples(st.just("pop"), st.none(), st.none()),
        st.tuples(st.just("pop ready"), st.none(), st.integers(1, 3)),
        st.tuples(st.just("put back"), st.none(), st.integers(0, 99)),
        st.tuples(st.just("remove"), st.none(), st.integers(0, 99)),
    ),
    max_size=150,
)


@settings(max_examples=300, deadline=None)
@given(operations=OPERATIONS)
def test_loses_nothing_and_keeps_each_tenants_order(operations):
    queue = FairQueue(20)
    numbers = count()
    put_back, waiting, running = [], {name: [] for name in "abcde"}, []
    for kind, tenant, number in operations:
        present = [*put_back, *(item for items in waiting.values() for item in items)]
        if kind == "push":
            item = (tenant, next(numbers))
            if len(present) < 20:
                queue.push(tenant, number, item)
                waiting[tenant].append(item)
            else:
                with pytest.raises(EngineOverloaded):
                    queue.push(tenant, number, item)
        elif kind == "pop" and present:
            expected = queue.peek()
            item = queue.pop()
            assert item == expected
            source = put_back or waiting[item[0]]
            assert source.pop(0) == item
            running.append(item)
        elif kind == "pop":
            assert queue.peek() is None
            with pytest.raises(IndexError):
                queue.pop()
        elif kind == "pop ready":
            ready = [item for item in present if item[1] % number == 0]
            item = queue.pop_ready(lambda one, number=number: one[1] % number == 0)
            assert (item is None) == (not ready)
            if item is not None:
                of_source = put_back if item in put_back else waiting[item[0]]
                assert item == next(one for one in of_source if one in ready)
                of_source.remove(item)
                running.append(item)
        elif kind == "put back" and running:
            item = running.pop(number % len(running))
            queue.push_front(item)
            put_back.insert(0, item)
        elif kind == "remove" and present:
            item = present[number % len(present)]
            assert queue.remove(item)
            assert not queue.remove(item)
            (put_back if item in put_back else waiting[item[0]]).remove(item)
        assert len(queue) == len(put_back) + sum(map(len, waiting.values()))
        assert queue.check() == []
    left = [*put_back, *(item for items in waiting.values() for item in items)]
    assert sorted(take_all(queue)) == sorted(left)


def test_who_is_passed_over_keeps_the_turn():
    queue = FairQueue(20)
    for name in ("a1", "a2", "a3"):
        queue.push("a", 10, name)
    for name in ("b1", "b2"):
        queue.push("b", 10, name)
    assert queue.pop() == "a1"
    taken = [queue.pop_ready(lambda item: item[0] != "a") for _ in range(3)]
    assert taken == ["b1", "b2", None]
    queue.push("c", 10, "c1")  # no later than who waits already
    assert take_all(queue) == ["a2", "c1", "a3"]
    queue.push("a", 10, "a4")
    queue.push("a", 10, "a5")
    assert queue.pop_ready(lambda item: item == "a5") == "a5"


def test_an_item_put_back_is_next_and_free_of_charge():
    queue = FairQueue(4)
    for name in ("a1", "a2"):
        queue.push("a", 10, name)
    queue.push("b", 10, "b1")
    assert queue.pop() == "a1"
    queue.push_front("a1")
    assert [queue.pop(), *take_all(queue)] == ["a1", "b1", "a2"]


def test_the_last_item_put_back_is_next():
    queue = FairQueue(4)
    for name in ("first", "second"):
        queue.push("a", 1, name)
    for name in reversed([queue.pop(), queue.pop()]):
        queue.push_front(name)
    assert take_all(queue) == ["first", "second"]


def test_a_full_queue_takes_back_what_it_accepted():
    queue = FairQueue(1)
    queue.push("a", 1, "a1")
    running = queue.pop()
    queue.push("a", 1, "a2")
    queue.push_front(running)
    with pytest.raises(EngineOverloaded, match="at most 1 waiting requests"):
        queue.push("b", 1, "b1")
    assert take_all(queue) == ["a1", "a2"]


def test_a_removed_item_costs_nothing():
    queue = FairQueue(4)
    queue.push("a", 1000, "cancelled")
    queue.push("a", 1, "a1")
    queue.push("b", 1, "b1")
    queue.push("b", 1, "b2")
    assert queue.remove("cancelled")
    assert take_all(queue) == ["a1", "b1", "b2"]


@pytest.mark.parametrize("tenant, lost", [("few", "many 2"), ("new", "many 2"), ("many", None)])
def test_makes_room_at_the_cost_of_whoever_has_most(tenant, lost):
    queue = FairQueue(4)
    for number in range(3):
        queue.push("many", 1, f"many {number}")
    queue.push("few", 1, "few 0")
    assert queue.displace(tenant) == lost
    left = take_all(queue)
    assert len(left) == (4 if lost is None else 3) and lost not in left
    assert queue.displace(tenant) is None


def test_makes_no_room_for_one_that_would_have_more():
    queue = FairQueue(3)
    for item in ("a0", "a1", "b0"):
        queue.push(item[0], 1, item)
    assert queue.displace("b") is None
    assert queue.check() == [] and len(queue) == 3


def test_a_queue_that_holds_nothing_refuses():
    with pytest.raises(EngineOverloaded):
        FairQueue(0).push("a", 1, "a1")


@pytest.mark.parametrize("is_served", [True, False], ids=["served", "cancelled"])
def test_forgets_tenants_that_come_once(is_served):
    queue = FairQueue(10)
    queue.push("stays", 1e9, "first")
    queue.pop()
    queue.push("stays", 1, "second")  # after all the others
    for number in range(5000):
        queue.push(f"tenant {number}", 1, number)
        if is_served:
            assert queue.pop() == number
        else:
            assert queue.remove(number)
    assert queue.check() == []
    assert len(queue._heap) < 100
    assert len(queue._finish_tags) <= fair_queue._MAX_IDLE_TENANTS
    assert take_all(queue) == ["second"]


@pytest.mark.parametrize("cost", [0, -1, float("inf"), float("nan")])
def test_refuses_a_cost_that_is_none(cost):
    with pytest.raises(ValueError, match="cost: expected a number above 0"):
        FairQueue(1).push("a", cost, "a1")


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan")])
def test_refuses_a_weight_that_is_none(weight):
    with pytest.raises(ValueError, match="weights: expected a number above 0 for 'a'"):
        FairQueue(1, weights={"a": weight})


def test_refuses_a_negative_bound():
    with pytest.raises(ValueError, match="max_items: expected 0 or more, got -1"):
        FairQueue(-1)


def test_refuses_an_item_twice():
    queue = FairQueue(4)
    queue.push("a", 1, "a1")
    with pytest.raises(ValueError, match="item: expected one that does not wait yet, got 'a1'"):
        queue.push("b", 1, "a1")
    with pytest.raises(ValueError, match="item: expected one that does not wait yet"):
        queue.push_front("a1")


def test_check_finds_a_lost_item():
    queue = FairQueue(4)
    queue.push("a", 1, "a1")
    del queue._tenant_of["a1"]
    assert queue.check() == ["queue: expected 1 items, got 0"]
