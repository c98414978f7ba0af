"""Plants one fault after another in a copy of the tree, and requires that some test fails.

Run it in tests: python -m planted_faults.run [--only TEXT]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from planted_faults.fault import Fault
from planted_faults.faults import FAULTS

ROOT = Path(__file__).resolve().parents[2]
TESTS_FAILED = 1  # pytest's exit status; others mean that it could not run them


def find_tool(name: str) -> str:
    """A program next to this Python, or on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def copy_tree(target: Path) -> None:
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, names):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def configure(tree: Path) -> None:
    pybind11_dir = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    command = [find_tool("cmake"), "-S", str(tree), "-B", str(tree / "build"), "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}", "-DKVKERNELS_EXTENSION=ON"]
    # Build time matters here, not speed.
    command += ["-DCMAKE_BUILD_TYPE=Planted", "-DCMAKE_CXX_FLAGS=-O1"]
    command += [f"-Dpybind11_DIR={pybind11_dir}", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run(command, check=True, capture_output=True)


def build(tree: Path) -> None:
    command = [find_tool("cmake"), "--build", str(tree / "build")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the build failed:\n{done.stdout[-3000:]}")
    for module in (tree / "build").glob("_kvkernels*.so"):
        shutil.copy2(module, tree / "python")


def run_tests(tree: Path, fault: Fault) -> tuple[int, str]:
    """pytest's exit status, and the first test that failed."""
    paths = [str(tree), str(tree / "python"), str(tree / "tests"), str(tree / "tests" / "ops")]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *fault.files]
    if fault.isa and fault.files[0].endswith("test_attention.py"):
        command += ["-k", f"{fault.isa} and not triton" + _others(fault.isa)]
    done = subprocess.run(
        command,
        cwd=tree,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return done.returncode, failed[0].split(" - ")[0].split("::")[-1] if failed else ""


def _others(isa: str) -> str:
    """Other names that contain this one."""
    return " and not avx512_bf16" if isa == "avx512" else ""


def check_fault(tree: Path, fault: Fault) -> bool:
    path = tree / fault.path
    text = path.read_text()
    if text.count(fault.old) != 1:
        print(f"{fault.name}: expected its text once in {fault.path}, got {text.count(fault.old)}")
        return False
    begin = time.monotonic()
    path.write_text(text.replace(fault.old, fault.new))
    try:
        build(tree)
        status, test = run_tests(tree, fault)
    finally:
        path.write_text(text)
    is_caught = status == TESTS_FAILED or status < 0  # an invalid read kills the tests
    test = test or "a crash"
    verdict = f"caught by {test}" if is_caught else f"SURVIVED (pytest's status {status})"
    print(f"{fault.name:48} {time.monotonic() - begin:4.0f} s  {verdict}", flush=True)
    return is_caught


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run only faults whose name contains this")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if options.only in fault.name]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        configure(tree)
        build(tree)
        for fault in {(fault.isa, fault.files): fault for fault in chosen}.values():
            status, test = run_tests(tree, fault)
            if status:
                raise SystemExit(f"without a fault, {test or 'pytest'} fails for {fault.isa}")
        survivors = [fault.name for fault in chosen if not check_fault(tree, fault)]
    print(f"{len(chosen)} faults, {len(chosen) - len(survivors)} caught")
    if survivors:
        print("not caught: " + ", ".join(survivors))
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
