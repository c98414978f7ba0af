"""What the demo ran on: the processor, the memory and the versions, for the summary."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("kvkernels", "torch", "transformers", "numpy")
# Without one of these a CPU emulates bfloat16 arithmetic and float32 is faster.
BFLOAT16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})


def describe_machine() -> dict[str, object]:
    """Processor, cores, memory and operating system."""
    info = _cpu_info()
    return {
        "processor": info.get("model name") or platform.processor() or platform.machine(),
        "num_cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "system": platform.platform(),
    }


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def choose_dtype(name: str) -> torch.dtype:
    """The dtype called `name`; "auto" is bfloat16 where the hardware computes in it."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    flags = _cpu_info().get("flags") or _cpu_info().get("Features") or ""
    has_bfloat16 = torch.cuda.is_available() or not BFLOAT16_FLAGS.isdisjoint(flags.split())
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo, or nothing where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # run from a source tree
