"""Code that is compiled for one instruction set stays in its file.

The linker keeps any one copy of an inline function that is in several files. If one of them were
compiled for AVX-512, every processor would run it.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

OBJECTS = sorted(
    path
    for path in Path(__file__).parents[1].glob("build/cmake-*/CMakeFiles/*/csrc/cpu/*.o")
    if re.search(r"_(avx2|avx512|avx512_bf16|avx512_vnni|amx)\.cpp\.o$", path.name)
)


@pytest.mark.skipif(not OBJECTS, reason="the extension was built elsewhere")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_files_for_an_instruction_set_share_no_code(path):
    listed = subprocess.run(
        ["nm", "--demangle", "--defined-only", path], check=True, capture_output=True, text=True
    )
    lines = listed.stdout.splitlines()
    assert any(re.search(r" [Tt] ", line) for line in lines)
    shared = [line for line in lines if re.search(r" [WVu] ", line) and "DW.ref" not in line]
    assert shared == []
