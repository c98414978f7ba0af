"""The inputs of a forward pass: packed for one copy to a GPU, and unpacked to the same there."""

import numpy as np
import pytest
import torch

from prefixstore.engine.pass_inputs import pack, to_device, unpack

ARRAYS = {
    "none": [],
    "one token": [np.array([7]), np.array([0, 1], np.int32)],
    "no whole vectors": [
        np.arange(5),
        np.arange(-3, 4, dtype=np.int32),
        np.arange(6, dtype=np.int32).reshape(2, 3),
        np.array([2**62]),
    ],
    "an empty one": [np.arange(3, dtype=np.int32), np.empty((4, 0), np.int32), np.arange(2)],
}


def as_given(tensors, arrays):
    assert len(tensors) == len(arrays)
    for tensor, array in zip(tensors, arrays, strict=True):
        given = torch.from_numpy(array)
        assert tensor.dtype == given.dtype
        assert torch.equal(tensor.cpu(), given)


@pytest.mark.parametrize("arrays", ARRAYS.values(), ids=ARRAYS.keys())
def test_a_device_gets_what_it_was_given(arrays, device):
    as_given(to_device(arrays, device), arrays)


@pytest.mark.parametrize("arrays", ARRAYS.values(), ids=ARRAYS.keys())
def test_packed_arrays_come_out_as_they_were_and_aligned(arrays):
    packed = pack(arrays, pin_memory=False)
    views = unpack(packed.clone(), arrays)
    as_given(views, arrays)
    assert all(view.storage_offset() * view.element_size() % 16 == 0 for view in views)
