"""Who may import whom: the table of the style guide as data, checked against every file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"kvkernels": ROOT / "kvkernels", "prefixstore": ROOT / "python" / "prefixstore"}

# The parts of a call that every implementation takes.
CONTRACT = ("kvkernels.scoring", "kvkernels.quantized_cache", "kvkernels.codecs")
CONTRACT += ("kvkernels.layout", "kvkernels.checks", "kvkernels.signatures")
NAMES = (
    "prefixstore.errors",
    "prefixstore.settings",
    "prefixstore.checksum",
    "prefixstore.block_key",
)
NAMES += ("prefixstore.record_header", "prefixstore.index", "prefixstore.keys")
AT_EXIT = ("prefixstore.at_exit",)
PROTECTION = ("prefixstore.protection",)
RECORD = ("prefixstore.record", "prefixstore.record_headers", "prefixstore.record_layout")
TIER_BASE = ("prefixstore.tiers.base", "prefixstore.tiers.pages")
TIER_PARTS = (*TIER_BASE, "prefixstore.tiers.outcomes")
DISK = ("prefixstore.tiers.disk",)
REDIS = ("prefixstore.tiers.redis",)
REMOTE = ("prefixstore.tiers.remote",)
STORE = ("prefixstore.store",)
PLANNER = ("prefixstore.residency", "prefixstore.planner")
CACHE = ("prefixstore.cache", "prefixstore.config", "prefixstore.device", "prefixstore.restore")
CACHE += ("prefixstore.session", "prefixstore.served_model", "prefixstore.pool_blocks")
CACHE += ("prefixstore.block_cache", "prefixstore.reuse_report", "prefixstore.pool_sizes")
CACHE += ("prefixstore.group_load", "prefixstore.missing_blocks", "prefixstore.pass_timer")
CACHE += ("prefixstore.patient_calls", "prefixstore.prefix_loads")
CACHE += (
    "prefixstore.write_holds",
    "prefixstore.tokens",
    "prefixstore.codec_choice",
    "prefixstore.cache_store",
    "prefixstore.tier_urls",
)
ENGINE = ("prefixstore.engine",)
OUTERMOST = ("prefixstore.cli", "prefixstore.commands", "prefixstore.extras")
OUTERMOST += ("prefixstore.demo", "prefixstore.quality", "prefixstore.records")
OUTERMOST += ("prefixstore.server", "prefixstore.loadtest", "prefixstore.testing.command")
TESTING = ("prefixstore.testing",)
DASHBOARD = ("prefixstore.dashboard",)

# A part's modules, and what they may import besides the standard library and each other. A name
# stands for itself and all below it; the longest name that matches a module decides its part.
RULES: dict[tuple[str, ...], tuple[str, ...]] = {
    # kvkernels never imports prefixstore; its top level offers the ops.
    ("kvkernels",): ("torch", "_kvkernels", "kvkernels.ops", *CONTRACT),
    CONTRACT: ("torch",),
    ("kvkernels.reference",): ("torch", *CONTRACT),
    ("kvkernels.triton_kernels",): ("torch", "triton", "kvkernels.errors", *CONTRACT),
    ("kvkernels.ops",): ("torch", "kvkernels"),
    ("kvkernels.nn",): ("torch", "kvkernels"),
    ("kvkernels.transfer",): ("torch", "kvkernels"),
    # Only code for Hugging Face models needs their library.
    (
        "kvkernels.nn.pool_cache",
        "kvkernels.nn.transformers",
        "kvkernels.nn.transformers_batch",
        "kvkernels.nn.transformers_cache",
        "kvkernels.nn.transformers_compat",
    ): ("torch", "transformers", "kvkernels"),
    ("prefixstore",): (),
    # `RecordLayout` is only an annotation there.
    NAMES: ("numpy", "_kvkernels", "prefixstore.record_layout"),
    RECORD: ("torch", "numpy", "kvkernels", *NAMES),
    # The only part that needs `cryptography`, once there is a key.
    PROTECTION: ("numpy", "cryptography", *NAMES),
    # A tier sees bytes: no tensors, and never the store.
    ("prefixstore.tiers",): ("numpy", *NAMES, *PROTECTION),
    # The extension tells where buffers begin, and moves the bytes of Redis.
    DISK: ("numpy", "_kvkernels", *TIER_PARTS, *NAMES),
    REDIS: ("redis", "_kvkernels", *TIER_PARTS, *NAMES),
    REMOTE: ("obstore", *TIER_PARTS, *NAMES),
    STORE: ("numpy", *TIER_BASE, *NAMES, *RECORD, *AT_EXIT),
    PLANNER: ("numpy",),
    # Besides the cache: what a model's KV depends on, and models to try it with.
    ("prefixstore.identity",): (
        *("torch", "numpy", "kvkernels", "prefixstore.errors", "prefixstore.foreign_code"),
        *("prefixstore.module_fields", "prefixstore.module_state"),
    ),
    ("prefixstore.module_fields",): ("torch", "kvkernels.checks"),
    ("prefixstore.module_state",): ("torch", "prefixstore.errors", "prefixstore.module_fields"),
    ("prefixstore.foreign_code",): ("torch", "kvkernels.nn.forward_patch"),
    ("prefixstore.module_watch",): (
        *("torch", "prefixstore.foreign_code"),
        *("prefixstore.module_fields", "prefixstore.module_state"),
    ),
    ("prefixstore.weight_watch",): ("torch",),
    ("prefixstore.models",): ("torch", "transformers", "prefixstore.errors"),
    CACHE: (
        *("torch", "numpy", "kvkernels", "prefixstore.tiers", "tomli"),
        *("prefixstore.identity", "prefixstore.module_state", "prefixstore.module_watch"),
        "prefixstore.weight_watch",
        *NAMES,
        *RECORD,
        *STORE,
        *PLANNER,
    ),
    # Not needed with another engine.
    ENGINE: (
        *("torch", "numpy", "kvkernels", "prefixstore.cache", "prefixstore.config"),
        *NAMES,
        *RECORD,
        *AT_EXIT,
        *STORE,
        *PLANNER,
        *CACHE,
    ),
    # Reads an engine and its cache, and changes nothing.
    DASHBOARD: (
        *("numpy", "fastapi", "anyio", "prefixstore.engine", "prefixstore.tiers.base"),
        *NAMES,
        *STORE,
        *CACHE,
    ),
    # For testing engines: ours and others.
    TESTING: (
        *("torch", "numpy", "kvkernels", "prefixstore.engine"),
        *NAMES,
        *RECORD,
        *STORE,
        *CACHE,
    ),
    # The outermost layer imports anything; only it imports itself.
    OUTERMOST: (
        *("torch", "numpy", "transformers", "click", "rich", "matplotlib"),
        *("fastapi", "starlette", "pydantic", "pydantic_core", "uvicorn", "h11", "httpx"),
        *("jinja2", "prometheus_client", "kvkernels", "prefixstore"),
    ),
}


def find_modules() -> dict[str, Path]:
    """Every module of both packages and its file."""
    modules = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            modules[name] = path
    return modules


MODULES = find_modules()


def is_within(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def part_of(module: str) -> tuple[str, ...]:
    """The part of RULES that a module belongs to."""
    fitting = [(len(n), part) for part in RULES for n in part if is_within(module, (n,))]
    return max(fitting)[1]


def imported_modules(source: str) -> Iterator[str]:
    """Absolute names of all modules a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level + (node.module or "")
                continue
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else str(node.module)


def violations(module: str, source: str) -> list[str]:
    """Imports in `source` that the part of `module` may not have."""
    part = part_of(module)
    allowed = RULES[part]
    found = []
    for name in imported_modules(source):
        if name.split(".")[0] in sys.stdlib_module_names:
            continue
        is_ours = name.split(".")[0] in PACKAGES
        if is_ours and part_of(name) == part:
            continue
        if is_within(name, allowed) and not (
            is_ours and part_of(name) == OUTERMOST and part != OUTERMOST
        ):
            continue
        found.append(f"{module} imports {name}")
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_only_inward(module: str) -> None:
    assert violations(module, MODULES[module].read_text()) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not even where one of the imports is in a function."""
    imported = {
        module: [name for name in imported_modules(path.read_text()) if name in MODULES]
        for module, path in MODULES.items()
    }
    TopologicalSorter(imported).prepare()


@pytest.mark.parametrize("part", RULES, ids=lambda part: part[0])
def test_every_rule_is_about_a_module_that_exists(part: tuple[str, ...]) -> None:
    assert [name for name in part if name not in MODULES] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvkernels.pool", "import prefixstore.errors"),
        ("kvkernels.pool", "import triton"),
        ("kvkernels.nn.module", "def f():\n    from transformers import Cache"),
        ("kvkernels.reference.attention", "from kvkernels.ops import store_kv"),
        ("prefixstore.tiers.disk", "from prefixstore.store import Store"),
        ("prefixstore.tiers.disk", "import torch"),
        ("prefixstore.tiers.protected", "import cryptography"),
        ("prefixstore.store", "from prefixstore.tiers.disk import DiskTier"),
        ("prefixstore.store", "import prefixstore.cache"),
        ("prefixstore.record", "import transformers"),
        ("prefixstore.cache", "from prefixstore.demo import run"),
        ("prefixstore.cache", "import click"),
        ("prefixstore.engine", "from prefixstore.server.app import create_app"),
        ("prefixstore.engine", "import fastapi"),
        ("prefixstore.cache", "from . import session"),
    ],
)
def test_finds_an_import_that_is_not_allowed(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import kvkernels", ("triton", "transformers", "prefixstore")),
        ("import kvkernels.nn", ("triton", "transformers", "prefixstore")),
        ("import prefixstore", ("torch", "kvkernels")),
        ("import prefixstore.store", ("triton", "transformers")),
        ("import prefixstore.index", ("torch", "kvkernels")),
        ("import prefixstore.planner", ("torch", "kvkernels")),
        ("import prefixstore.tiers.disk, prefixstore.tiers.memory", ("torch", "kvkernels")),
        ("import prefixstore.tiers.protected", ("torch", "kvkernels", "cryptography")),
        ("import prefixstore.tier_urls", ("triton", "transformers", "redis", "obstore")),
        ("import prefixstore.tiers.remote", ("torch", "kvkernels", "obstore")),
        ("import prefixstore.cli", ("click", "rich", "torch", "transformers")),
        (
            "import prefixstore.commands",
            ("transformers", "fastapi", "uvicorn", "matplotlib", "httpx"),
        ),
    ],
)
def test_importing_stays_light(program: str, absent: tuple[str, ...]) -> None:
    program += f"; import sys; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def cpp_files() -> list[Path]:
    folders = (ROOT / "csrc", ROOT / "tests" / "cpp")
    return [
        path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".cpp", ".h", ".cu", ".cuh")
    ]


@pytest.mark.parametrize("path", cpp_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_cpp_includes_neither_pytorch_nor_pybind11(path: Path) -> None:
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE)
    forbidden = ["torch/", "ATen/", "c10/"]
    if path.parent != ROOT / "csrc" / "bindings":
        forbidden.append("pybind11/")
    assert [name for name in included if name.startswith(tuple(forbidden))] == []
