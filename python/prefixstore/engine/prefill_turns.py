"""How prompts share the tokens of a forward pass: by tenant, the short one and the oldest first."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prefixstore.planner import LoadAhead, front_budget

LEAST_TOKENS = 32  # of a share: even the shortest chunk costs a pass its fixed part

# Most tokens that a role may be owed, or owe, from pass to pass: enough to take turns.
_MOST_OWED = 2 * LEAST_TOKENS

_Role = tuple[str, str]  # tenant, and whether it is its shortest prompt or its oldest


@dataclass(frozen=True)
class Prefill:
    """A prompt in prefill.

    Attributes:
        tenant: Whose it is.
        num_left: Tokens that are not there yet.
        load: What of these is still to be loaded.
    """

    tenant: str
    num_left: int
    load: LoadAhead | None = None

    @property
    def has_front(self) -> bool:
        """Whether its chunk would save loading what it computes."""
        return self.load is not None and self.load.front_tokens > 0


@dataclass
class Turn:
    """A prompt is asked for a chunk.

    Attributes:
        index: Of the prompt.
        max_tokens: Of the chunk.
        num_taken: Its tokens, to be set before the next turn; 0 where there is no chunk now.
    """

    index: int
    max_tokens: int
    num_taken: int = 0


class PrefillTurns:
    """Which prompts have chunks in a pass, and of which size.

    Tenants have equal shares. Of one tenant's prompts the one with the fewest tokens left has half
    of the share, so that it does not wait for long ones, and the oldest the other half, so that it
    does not wait for ever. Prompts of equal length are so computed one after the other: the first
    is done sooner, and the last no later, than if all went on side by side. Others take what those
    leave, the shorter first.

    Prompts that still load have no more than `front_budget`; where that is less than the pass, they
    have it apart from the others' shares.

    Where shares of `LEAST_TOKENS` for all are more than the pass has, those have one that are owed
    most, as in deficit round robin (Shreedhar and Varghese, "Efficient fair queueing using deficit
    round robin", SIGCOMM 1995)::

        a pass of 64    a    b    c       each is due 21
        takes          32   32    -
        is owed       -11  -11   21       so c is in the next one
        takes          32    -   32
        is owed       -22   11   11       and b and c in the one after it
    """

    def __init__(self) -> None:
        self._owed: dict[_Role, float] = {}  # tokens; of those in the last pass

    def of_pass(self, prompts: Sequence[Prefill], budget: int) -> Iterator[Turn]:
        """The turns of a pass; to be run through to the end.

        Args:
            prompts: The oldest first.
            budget: Tokens of the pass.
        """
        if budget <= 0:
            return
        by_length = sorted(range(len(prompts)), key=lambda i: prompts[i].num_left)
        left, fronts = budget, []
        fronts_left = _front_budget(prompts, budget)
        if fronts_left < budget:
            fronts = [i for i in by_length if prompts[i].has_front]
        for i in fronts:
            if not (most := min(left, fronts_left)):
                break
            turn = Turn(i, most)
            yield turn
            left -= turn.num_taken
            fronts_left -= turn.num_taken
        yield from self._share(prompts, [i for i in by_length if i not in fronts], left)

    def _share(
        self, prompts: Sequence[Prefill], by_length: Sequence[int], budget: int
    ) -> Iterator[Turn]:
        """Turns of some of the prompts, by tenant and length."""
        roles = _roles(prompts, by_length)
        taken: dict[int, int] = {}
        left = budget
        for i, share in self._order(by_length, roles, budget):
            if left <= 0:
                break
            turn = Turn(i, min(left, max(LEAST_TOKENS, round(left * share))))
            yield turn
            taken[i] = turn.num_taken
            left -= turn.num_taken
        # Prompts that want no chunk, or got all that is left of them, are owed nothing.
        content = {i for i, num in taken.items() if num == 0 or num >= prompts[i].num_left}
        self._settle(roles, {i: taken.get(i, 0) for i in roles}, content)

    def _order(
        self, by_length: Sequence[int], roles: Mapping[int, Sequence[_Role]], budget: int
    ) -> Iterator[tuple[int, float]]:
        """Who is asked one after another, and for which share of what is left by then."""
        debts = {
            i: sum(self._owed.get(role, 0.0) for role in own) / len(own) for i, own in roles.items()
        }
        # `sorted` is stable, so of equal debts the shorter prompt comes first, as in `roles`.
        by_debt = sorted(roles, key=lambda i: -debts[i])
        num_served = _num_with_room([len(roles[i]) for i in by_debt], budget)
        served = set(by_debt[:num_served])
        for order in ([i for i in by_length if i in served], by_debt[num_served:]):
            left = sum(len(roles[i]) for i in order)
            for i in order:
                yield i, len(roles[i]) / left
                left -= len(roles[i])
        for i in by_length:
            if i not in roles:
                yield i, 1.0

    def _settle(
        self,
        roles: Mapping[int, Sequence[_Role]],
        taken: Mapping[int, int],
        content: Collection[int],
    ) -> None:
        """Carry what each was due in a pass, and did not take, on to the next one."""
        due = _due({i: len(own) for i, own in roles.items()}, taken, content)
        before, self._owed = self._owed, {}
        for i, own in roles.items():
            for role in own:
                owed = before.get(role, 0.0) + due - taken[i] / len(own)
                # Bounded, for two reasons: nobody saves up turns, and the odd tokens that chunks
                # ending at block boundaries leave in every pass must not add up.
                most = 0.0 if i in content else _MOST_OWED
                self._owed[role] = max(-_MOST_OWED, min(owed, most))


def _front_budget(prompts: Sequence[Prefill], budget: int) -> int:
    """Tokens that prompts which still load may have in a pass, for the sake of the others."""
    loads = [one.load for one in prompts if one.load is not None]
    others = [one.num_left for one in prompts if one.load is None]
    return int(min(front_budget(loads, len(others), min(sum(others), budget)), budget))


def _roles(prompts: Sequence[Prefill], by_length: Sequence[int]) -> dict[int, list[_Role]]:
    """What each prompt is among those of its tenant, the shorter first; without the others."""
    shortest: dict[str, int] = {}
    oldest: dict[str, int] = {}
    for i in by_length:
        shortest.setdefault(prompts[i].tenant, i)
    for i in sorted(by_length):
        oldest.setdefault(prompts[i].tenant, i)
    roles: dict[int, list[_Role]] = {}
    for i in by_length:
        for name, chosen in (("shortest", shortest), ("oldest", oldest)):
            if chosen[prompts[i].tenant] == i:
                roles.setdefault(i, []).append((prompts[i].tenant, name))
    return roles


def _num_with_room(weights: Sequence[int], budget: int) -> int:
    """How many, from the front, can share a pass so that none has less than `LEAST_TOKENS`."""
    least = total = 0
    for number, weight in enumerate(weights):
        least = min(least, weight) if number else weight
        total += weight
        if number and total * LEAST_TOKENS > budget * least:
            return number
    return len(weights)


def _due(weights: Mapping[int, int], taken: Mapping[int, int], content: Collection[int]) -> float:
    """What each was due for a weight of 1, so that who was content with less had no more."""
    counted = set(weights)
    while counted:
        due = sum(taken[i] for i in counted) / sum(weights[i] for i in counted)
        sated = {i for i in counted & set(content) if taken[i] < due * weights[i]}
        if not sated:
            return due
        counted -= sated
    return 0.0
