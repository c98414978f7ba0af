"""What a check found, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from prefixstore.testing.cells import Cell
from prefixstore.testing.states import STATES

_MAX_FAULTS = 5  # of one cell that are printed; the JSON has all


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_text(self) -> str:
        """In columns of equal width."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, text[0], "-" * len(text[0]), *text[1:]])


@dataclass(frozen=True)
class Report:
    """All cells of a check.

    Attributes:
        cells: One for each state of each engine, codec and tier.
        num_prompts: That were asked.
        prompt_tokens: Of all of them.
        num_new: Tokens of an answer.
        block_size: Tokens in a block.
        seconds: That it took.
    """

    cells: tuple[Cell, ...]
    num_prompts: int
    prompt_tokens: int
    num_new: int
    block_size: int
    seconds: float

    @property
    def is_good(self) -> bool:
        return not self.faults

    @property
    def faults(self) -> list[str]:
        """A line for each thing that is wrong, with the cell where."""
        return [f"{_place(cell)}: {fault}" for cell in self.cells for fault in cell.faults]

    def find(self, **fields: str) -> list[Cell]:
        """The cells with these values of their fields."""
        return [
            cell
            for cell in self.cells
            if all(getattr(cell, name) == value for name, value in fields.items())
        ]

    def tables(self) -> list[Table]:
        """For each engine its states by codec and tier, then what lossy codecs did."""
        names = list(dict.fromkeys(cell.adapter for cell in self.cells))
        tables = [_states_table(name, self.find(adapter=name)) for name in names]
        lossy = [cell for cell in self.cells if cell.loss is not None]
        return [*tables, _loss_table(lossy)] if lossy else tables

    def notes(self) -> list[str]:
        """What the tables have no room for: ties, what was left out, what is wrong."""
        notes = []
        for cell in self.cells:
            place = _place(cell)
            notes += [
                f"{place}: prompt {one.prompt} has a tie at token {one.position} of the answer:"
                f" logits {one.gap:.1e} apart"
                for one in cell.divergences
                if one.is_tie
            ]
            if cell.skipped:
                notes.append(f"{place}: not run: {cell.skipped}")
        for cell in self.cells:
            notes += [f"WRONG {_place(cell)}: {fault}" for fault in cell.faults[:_MAX_FAULTS]]
            if len(cell.faults) > _MAX_FAULTS:
                notes.append(f"WRONG {_place(cell)}: and {len(cell.faults) - _MAX_FAULTS} more")
        return notes

    def summary(self) -> str:
        num_run = sum(not cell.skipped for cell in self.cells)
        num_wrong = sum(bool(cell.faults) for cell in self.cells)
        verdict = "all as they must be" if self.is_good else f"{num_wrong} WRONG"
        drifts = [cell.max_drift for cell in self.cells if cell.max_drift is not None]
        if drifts:
            verdict += f"; log-probabilities at most {max(drifts):.1e} off"
        return (
            f"{num_run} cells of {self.num_prompts} prompts ({self.prompt_tokens} tokens) and"
            f" {self.num_new} new tokens, in {self.seconds:.0f} s: {verdict}"
        )

    def to_text(self) -> str:
        parts = [table.to_text() for table in self.tables()]
        notes = self.notes()
        if notes:
            parts.append("\n".join(notes))
        return "\n\n".join([*parts, self.summary()]) + "\n"

    def to_json(self) -> str:
        return json.dumps({"is_good": self.is_good, **asdict(self)}, indent=2) + "\n"


def _place(cell: Cell) -> str:
    return f"{cell.adapter}, {cell.codec}, {cell.tier}, {cell.state}"


def _states_table(adapter: str, cells: Sequence[Cell]) -> Table:
    columns = list(dict.fromkeys((cell.codec, cell.tier) for cell in cells))
    order = [state.name for state in STATES]
    states = sorted(
        dict.fromkeys(cell.state for cell in cells),
        key=lambda name: order.index(name) if name in order else len(order),
    )
    by_place = {(cell.codec, cell.tier, cell.state): cell for cell in cells}
    rows = [
        (state, *(_verdict(by_place.get((*column, state))) for column in columns))
        for state in states
    ]
    is_bitwise = any(cell.is_bitwise for cell in cells)
    return Table(
        f"{adapter}{' (bit for bit)' if is_bitwise else ''}: equal answers, reused tokens",
        ("state", *(f"{codec} {tier}" for codec, tier in columns)),
        tuple(rows),
    )


def _verdict(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.skipped:
        return "-"
    share = "" if cell.reused_share is None else f" {100 * cell.reused_share:.0f} %"
    num_ties = sum(one.is_tie for one in cell.divergences)
    ties = f" {num_ties} tied" if num_ties else ""
    return f"{'WRONG ' if cell.faults else ''}{cell.num_equal}/{cell.num_answers}{ties}{share}"


def _loss_table(cells: Sequence[Cell]) -> Table:
    counts, distances = ("equal", "median", "p10"), ("max", "mean", "KL", "drift")
    header = ("engine", "codec", "tier", "state", *counts, *distances)
    rows = []
    for cell in cells:
        loss = cell.loss
        assert loss is not None
        known = (loss.max_abs, loss.mean_abs, loss.kl, loss.drift)
        figures = ["" if one is None else f"{one:.1e}" for one in known]
        rows.append(
            (
                *(cell.adapter, cell.codec, cell.tier, cell.state),
                f"{100 * loss.equal_share:.0f} %",
                *(f"{loss.median:g}", f"{loss.p10:g}", *figures),
            )
        )
    return Table(
        "codecs with loss: equal answers, equal tokens before the first other one, distance of the"
        " first token's logits, mean drift of an answer's log-probabilities",
        header,
        tuple(rows),
    )
