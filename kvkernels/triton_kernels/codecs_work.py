"""What all launches of one call of the codecs share, and the arguments that follow from it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from kvkernels.codecs import BlockFormat, LayerFormat, SideFormat
from kvkernels.triton_kernels.launch import Device, Launch

NUM_WARPS = 4
_TILE_WORDS = 4096
# Without this, the assembler sometimes spills a few bytes to stay at a round number of registers.
_MAX_REGISTERS = 255
# Programs per multiprocessor where the caller sets no bound: more than run at once.
_MAX_PROGRAMS = 32
_INTEGERS = {2: torch.int16, 4: torch.int32}  # by bytes

Layers = list[tuple[int, LayerFormat]]


@functools.cache
def _layer_table(entries: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """`[layers, 2]`, int64, kept for good: layers, and where they begin in units of 64 bytes."""
    with torch.inference_mode(False):
        table = torch.tensor(entries, dtype=torch.int64, device="cpu")
        if device.type != "cuda":
            return table.to(device)
        # It is there before anyone can have it, as kernels on any stream will read it; on a stream
        # of its own, so that it waits for nobody's work.
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            table = table.pin_memory().to(device, non_blocking=True)
        stream.synchronize()
        return table


@dataclass(frozen=True)
class Work:
    """What the launches of a call share; see `encode_blocks` for the tensors.

    Attributes:
        device: Where they run.
        num_programs: At most so many at once; None for no bound.
        chosen: The layers it is about; None for all.
    """

    blocks: torch.Tensor
    block_ids: torch.Tensor
    block_format: BlockFormat
    payloads: torch.Tensor
    is_raw: torch.Tensor
    device: Device
    num_programs: int | None
    chosen: range | None = None

    def launch(
        self,
        kernel: Any,
        layers: Layers,
        num_pieces: int,
        num_warps: int = NUM_WARPS,
        **arguments: Any,
    ) -> Launch:
        """A kernel for some layers of all blocks, each in so many pieces."""
        num_items = len(self.block_ids) * len(layers) * num_pieces
        bound = self.num_programs or _MAX_PROGRAMS * self.device.num_multiprocessors
        entries = tuple((index, layer.offset // 64) for index, layer in layers)
        common = {
            "payloads_ptr": self.payloads,
            "layers_ptr": _layer_table(entries, self.blocks.device),
            "num_items": num_items,
            "num_chosen": len(layers),
            "num_layers": self.block_format.layout.num_layers,
            "stride_row": self.payloads.stride(0) // 4,
        }
        return Launch(
            kernel,
            (min(num_items, bound),),
            common | arguments,
            num_warps,
            max_registers=_MAX_REGISTERS,
            fp_fusion=False,
        )

    @property
    def raw_flags(self) -> dict[str, Any]:
        """The argument that says which blocks are raw, or gets it, for kernels that have it."""
        return {"is_raw_ptr": self.is_raw.view(torch.uint8)}

    @property
    def rows(self) -> dict[str, Any]:
        """Arguments that say where blocks lie, for kernels of elements."""
        layout = self.block_format.layout
        return {
            "blocks_ptr": self.blocks,
            "block_ids_ptr": self.block_ids,
            "stride_block": self.blocks.stride(0),
            "NUM_HEADS": layout.num_kv_heads,
            "BLOCK_SIZE": layout.block_size,
            "HEAD_DIM": layout.head_dim,
        }

    def elements(self, side: SideFormat) -> dict[str, Any]:
        """The same for kernels of one side of a layer."""
        layout = self.block_format.layout
        plane = layout.num_kv_heads * layout.block_size * layout.head_dim
        return self.rows | {
            "LAYER": layout.num_planes * plane,
            "FIRST": side.plane * plane + side.channels.start,
            "NUM_CHANNELS": len(side.channels),
        }

    def bits(self, side: SideFormat) -> dict[str, Any]:
        """The same for kernels that see elements as integers."""
        as_integers = self.blocks.view(_INTEGERS[self.blocks.itemsize])
        return self.elements(side) | {"blocks_ptr": as_integers}

    @property
    def words(self) -> dict[str, Any]:
        """Arguments for kernels of words, whatever the elements are."""
        words = self.blocks.flatten(1).view(torch.int32)
        return {
            "blocks_ptr": words,
            "block_ids_ptr": self.block_ids,
            "stride_block": words.stride(0),
            "LAYER": words.shape[1] // self.block_format.layout.num_layers,
        }

    def layers(self) -> Iterator[tuple[LayerFormat, Layers]]:
        """Layers by codec: how one of them is written, and which they are."""
        found: dict[str, Layers] = {}
        for index, layer in self._choose(self.block_format):
            found.setdefault(layer.codec.name, []).append((index, layer))
        for layers in found.values():
            yield layers[0][1], layers

    def copy(
        self, kernel: Any, layers: Layers, raw_blocks: bool | None, **arguments: Any
    ) -> Launch:
        """A kernel of words, for blocks that are raw, those that are not, or all."""
        num_words = layers[0][1].num_bytes // 4
        return self.launch(
            kernel,
            layers,
            triton.cdiv(num_words, _TILE_WORDS),
            NUM_WARPS,
            NUM_WORDS=num_words,
            RAW_BLOCKS=raw_blocks,
            TILE=_TILE_WORDS,
            **self.raw_flags,
            **arguments,
        )

    @property
    def raw_layers(self) -> Layers:
        """The layers as a block has them that is written raw."""
        return self._choose(self.block_format.raw)

    def _choose(self, block_format: BlockFormat) -> Layers:
        layers = list(enumerate(block_format.layers))
        return layers if self.chosen is None else layers[self.chosen.start : self.chosen.stop]
