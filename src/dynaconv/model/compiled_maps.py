"""What the compiled layers share: maps with their channels innermost, and the library that reads and writes them."""

import ctypes
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from dynaconv import native

FLOATS: Any = {"dtype": torch.float32, "device": "cpu"}
"""What the library writes, whatever torch's defaults have been set to."""

LANES = 16
"""Numbers in a vector: channels and outputs are continued to a multiple of it."""


class Pooled(NamedTuple):
    """Maps, channels innermost; what max-pooling left of them, where `places` tells whence in its window."""

    numbers: torch.Tensor
    places: torch.Tensor | None

    def size(self, other: "Pooled") -> tuple[int, int]:
        """Returns height and width before any pooling, of these maps and others of which one was not pooled."""
        height, width = (other if self.places is not None else self).numbers.shape[2:]
        return height, width


def empty_maps(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Returns (N, C, H, W) maps on the CPU, channels innermost, to be written by the library."""
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)


def innermost(maps: torch.Tensor) -> torch.Tensor:
    """Returns maps with their channels innermost in memory."""
    return maps.contiguous(memory_format=torch.channels_last)


def address(tensor: torch.Tensor | None) -> int | None:
    """Returns where the numbers lie, or None of none."""
    return None if tensor is None else tensor.data_ptr()


def in_pairs(weights: torch.Tensor) -> torch.Tensor:
    """Returns (N, K) weights as pairs of bfloat16, K continued to an even number: what kernels are mixed with."""
    return functional.pad(weights.to(torch.bfloat16), (0, weights.shape[1] % 2)).contiguous()


def unpool(maps: Pooled, shape: torch.Size) -> torch.Tensor:
    """Returns maps as they were before max-pooling, zeros where nothing was taken, for (N, any, H, W) of `shape`."""
    if maps.places is None:
        return maps.numbers
    images, outputs = maps.numbers.shape[:2]
    whole = empty_maps(images, outputs, *shape[2:])
    sizes = native.Shape(images, *shape[2:], 0, outputs, 0)
    loaded().dynaconv_unpool(*(address(each) for each in (*maps, whole)), sizes, torch.get_num_threads())
    return whole


def loaded() -> ctypes.CDLL:
    """Returns the library, where `computes` has found one."""
    library = native.library()
    if library is None:
        raise RuntimeError(f"no compiled convolution here: {native.why_not()}")
    return library


def check(failed: int) -> None:
    """Raises MemoryError if a function of the library has told that it could not allocate its working space."""
    if failed:
        raise MemoryError("a compiled layer could not allocate its working space")
