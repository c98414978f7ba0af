"""Writes docs/record-vectors.json; run by hand when the format is extended."""

import json
from pathlib import Path

import numpy as np
import torch

from kvkernels import CODECS
from prefixstore.record import RecordLayout, chain_keys, decode, encode
from prefixstore.record_layout import DTYPES

PATH = Path(__file__).resolve().parents[2] / "docs" / "record-vectors.json"
IDENTITY = bytes(range(16))


def layouts() -> dict[str, RecordLayout]:
    """The layouts that vectors are made of, by name."""
    of_codecs = {name: RecordLayout(1, 1, 8, 16, "bfloat16", 0, (name,)) for name in CODECS}
    return of_codecs | {
        "q8 of float16": RecordLayout(1, 2, 4, 16, "float16", 1, ("q8",)),
        "q4 of float32": RecordLayout(1, 1, 4, 16, "float32", 0, ("q4",)),
        "q8 of minus zeros": RecordLayout(1, 1, 8, 16, "bfloat16", 0, ("q8",)),
        "q8 of very small scales": RecordLayout(1, 1, 8, 16, "bfloat16", 0, ("q8",)),
        "a codec for each layer": RecordLayout(3, 1, 4, 16, "bfloat16", 0, ("l12", "q8", "q2")),
        "raw where q8 does not hold it": RecordLayout(1, 1, 4, 16, "bfloat16", 0, ("q8",)),
        "raw latents": RecordLayout(2, 1, 6, 16, "bfloat16", 0, ("raw",), latent_dim=4),
        "q8 of latents": RecordLayout(2, 1, 6, 16, "bfloat16", 0, ("q8",), latent_dim=4),
    }


def make_block(layout: RecordLayout, name: str) -> np.ndarray:
    """Numbers of different magnitudes with one outlier, and an infinity if asked for."""
    generator = torch.Generator().manual_seed(len(name))
    shape = layout.block_format.layout.block_shape
    sizes = 2.0 ** torch.randint(-6, 3, (shape[-1],), generator=generator)
    numbers = torch.randn(shape, generator=generator) * sizes
    numbers[0, 0, 0, 3, 1] = 2.0**-30 if "l12" in name else 600.0
    if "does not hold" in name:
        numbers[0, 1, 0, 5, 2] = float("inf")
    if "minus zeros" in name:
        numbers[0, 0, 0, :, 2] = numbers[0, 1, 0, 5, :] = -0.0
    if "small scales" in name:
        numbers = torch.randn(shape, generator=generator) * 4e-5
    if layout.latent_dim:
        numbers[0, 0, 0, 7, layout.latent_dim] = 3e38  # rotary parts are not quantised
    return numbers.to(DTYPES[layout.dtype]).view(torch.uint8).numpy().reshape(-1)


def make_vector(name: str, layout: RecordLayout) -> dict[str, str]:
    (key,) = chain_keys(layout, IDENTITY, range(100, 116))
    block = make_block(layout, name)
    record = bytearray(layout.max_record_bytes)
    num_bytes = encode(key, block, record)
    decoded = bytearray(layout.block_bytes)
    decode(record[:num_bytes], key, decoded)
    vector = {"name": name, "record": record[:num_bytes].hex(), "block": block.tobytes().hex()}
    return vector | ({} if decoded == block.tobytes() else {"decoded": decoded.hex()})


if __name__ == "__main__":
    vectors = [make_vector(*item) for item in layouts().items()]
    PATH.write_text(json.dumps(vectors, indent=1) + "\n")
