"""The planted faults' texts still occur in the kernels: whoever changes a kernel adapts them."""

from pathlib import Path

import pytest

from planted_faults.fault import Fault
from planted_faults.faults import FAULTS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_has_one_place(fault: Fault) -> None:
    assert (ROOT / fault.path).read_text().count(fault.old) == 1
    assert fault.new != fault.old
    assert all((ROOT / file).exists() for file in fault.files)
