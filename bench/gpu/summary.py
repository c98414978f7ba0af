"""A result of `bench.gpu` as a short plain text: a line per case, and what failed.

`python -m bench.gpu.summary RESULT.json` prints it.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MAX_LINES, MAX_COLUMNS = 60, 130
MAX_ERROR_CHARS, MAX_ERROR_LINES = 100, 12

Row = dict[str, Any]
HEADER = f"{'attention':<28}{'us':>9}{'floor us':>10} {'by':<7}{'share':>6}  "
HEADER += "best peer, its us, over ours; others over ours (fi: FlashInfer)"


def summarise(result: dict[str, Any]) -> str:
    """At most MAX_LINES lines of MAX_COLUMNS characters, also of an incomplete result."""
    timings: list[Row] = result.get("timings", [])
    lines = [
        *_describe(result),
        *_failures(result),
        *_attention_lines(timings),
        *_other_lines(timings),
    ]
    if len(lines) > MAX_LINES:
        left_out = len(lines) - MAX_LINES + 1
        lines = [*lines[: MAX_LINES - 1], f"({left_out} more lines are left out)"]
    return "\n".join(line[:MAX_COLUMNS].rstrip() for line in lines)


def _describe(result: dict[str, Any]) -> Iterator[str]:
    machine = result.get("machine", {})
    rates = [
        f"{row['name']} {row[unit]:.0f} {unit}"
        for row in _rows(result.get("rates"))
        for unit in ("gbytes_per_s", "tflops")
        if unit in row
    ]
    versions = [
        f"{name} {machine[name]}" for name in ("torch", "triton", "cuda") if name in machine
    ]
    yield ", ".join([str(machine.get("device", "unknown device")), *versions, *rates])
    counts = []
    for topic, value in result.items():
        rows = [row for row in _rows(value) if "ok" in row]
        if rows:
            counts.append(f"{topic} {sum(row['ok'] for row in rows)}/{len(rows)}")
    state = "complete" if result.get("is_complete") else "cut short"
    yield f"{state}; succeeded: {', '.join(counts) or 'nothing ran'}"


def _rows(value: Any) -> list[Row]:
    """The rows of a topic, whether it has one or many."""
    found = value if isinstance(value, list) else [value]
    return [row for row in found if isinstance(row, dict)]


def _attention_lines(timings: Iterable[Row]) -> Iterator[str]:
    """Rows that have a floor; rows of one case with different peers share a line."""
    cases: dict[str, list[Row]] = {}
    for row in timings:
        if "floor_us" in row:
            cases.setdefault(str(row.get("case", row["name"])), []).append(row)
    if cases:
        yield HEADER
    for name, rows in cases.items():
        yield _attention_line(name, rows)


def _attention_line(name: str, rows: list[Row]) -> str:
    first = rows[0]
    line = f"{name:<28}{first['kvkernels']['graph_us']:>9.1f}{first['floor_us']:>10.1f}"
    line += f" {first['floor_by']:<7}{first['share_of_floor']:>6.2f}"
    # Each peer compared with ours in the same row, measured in the same rounds.
    ratios = {
        _short(peer): (times["graph_over_ours"], times["graph_us"])
        for row in rows
        for peer, times in row.get("peers", {}).items()
        if "graph_us" in times
    }
    if ratios:
        best = min(ratios, key=ratios.__getitem__)
        line += f"  {best} {ratios[best][1]:.1f} {ratios[best][0]:.2f}"
        rest = sorted((ratio, peer) for peer, (ratio, _) in ratios.items() if peer != best)
        line += "".join(f"; {peer} {ratio:.2f}" for ratio, peer in rest)
    if "graph_over_plain" in first:
        line += f"  over plain {first['graph_over_plain']:.2f}"
    return line


def _short(peer: str) -> str:
    return peer.removeprefix("sdpa_").replace("flashinfer", "fi")


def _other_lines(timings: Iterable[Row]) -> Iterator[str]:
    """Stores, transfers, codecs, shared prefixes and overheads, several on a line."""
    items: dict[str, list[str]] = {}
    for row in timings:
        name, topic = row["name"], row["name"].split("_")[0]
        if not row.get("ok", True) or "floor_us" in row:
            continue
        if "flat" in row:
            ratio = row["flat"]["graph_us"] / row["shared_prefix"]["graph_us"]
            items.setdefault("shared prefix, flat over shared", []).append(f"{name} {ratio:.2f}")
        elif topic == "codec":
            items.setdefault("codecs, best GB/s", []).append(_codec_item(row))
        elif topic == "overhead":
            items["processor's us of a call"] = [
                f"{case} {times['remembered_us']:.0f}"
                for case, times in row.items()
                if isinstance(times, dict)
            ]
        elif "share_of_link" in row:
            items.setdefault("records on their way, GB/s and share of the link", []).append(
                f"{name[9:]} {row['gbytes_per_s']:.0f} {100 * row['share_of_link']:.0f}%"
            )
        elif topic == "transfer":
            items["transfer, GB/s"] = [
                f"{key.removesuffix('_gbytes_per_s')} {value:.1f}"
                for key, value in row.items()
                if key.endswith("_gbytes_per_s")
            ]
        elif "gbytes_per_s" in row:
            items.setdefault("stores, GB/s", []).append(
                f"{name.removeprefix('store_')} {row['gbytes_per_s']:.0f}"
            )
    for title, parts in items.items():
        yield from _fill(f"{title}: ", parts)


def _codec_item(row: Row) -> str:
    best = {
        way: max(value for key, value in row.items() if key.startswith(f"{way}_"))
        for way in ("encode", "decode")
    }
    return f"{row['name'][6:]} {best['encode']:.0f} in, {best['decode']:.0f} out"


def _fill(title: str, parts: Iterable[str]) -> Iterator[str]:
    """Lines, each with as many parts as fit."""
    line = title
    for part in parts:
        if len(line) + len(part) + 2 > MAX_COLUMNS and line.strip():
            yield line
            line = "  "
        line += part + "; "
    yield line.rstrip("; ")


def _failures(result: dict[str, Any]) -> list[str]:
    """Each error of a topic's rows and their peers once, with the number of rows that had it."""
    names: dict[tuple[str, str], list[str]] = {}
    for topic, value in result.items():
        for row in _rows(value):
            name = str(row.get("name", topic))
            if row.get("ok") is False:
                error = _flat(row.get("error") or row.get("end"))
                names.setdefault((f"FAILED {topic}", error), []).append(name)
            for peer, times in row.get("peers", {}).items():
                if "error" in times:
                    names.setdefault((f"peer {peer}", _flat(times["error"])), []).append(name)
    lines = []
    for (what, error), rows in names.items():
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        title = f"{what} {rows[0]}{more}: "
        fits = len(title) + len(error) <= MAX_COLUMNS
        lines += [title + error] if fits else [title, f"  {error}"]
    if len(lines) > MAX_ERROR_LINES:
        left_out = len(lines) - MAX_ERROR_LINES + 1
        lines = [*lines[: MAX_ERROR_LINES - 1], f"({left_out} more lines on errors are left out)"]
    return lines


def _flat(error: Any) -> str:
    return " ".join(str(error).split())[:MAX_ERROR_CHARS]


if __name__ == "__main__":
    print(summarise(json.loads(Path(sys.argv[1]).read_text())))
