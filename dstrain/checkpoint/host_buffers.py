"""Host memory for one snapshot of a rank's pieces, kept from save to save."""

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from dstrain.checkpoint.fragments import Piece

_ALIGNMENT_BYTES = 64


class HostBuffers:
    """One block of memory as large as the pieces, made at the first copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._block = torch.empty(0, dtype=torch.uint8)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def follow(self) -> None:
        """Let the next copy begin after all that this thread has had the device do so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Copies of the pieces, in this memory; those of an earlier call are overwritten. On any thread."""
        if self._stream is None:
            return self._copy(pieces)
        with torch.cuda.stream(self._stream):
            copies = self._copy(pieces)
        self._stream.synchronize()
        return copies

    def _copy(self, pieces: Sequence[Piece]) -> list[Piece]:
        ends, end = [], 0
        for _, tensor in pieces:
            end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            ends.append(end)
        if end > self._block.numel():
            self._block = self._allocate(end)
        copies, start = [], 0
        for (key, tensor), stop in zip(pieces, ends, strict=True):
            size = tensor.numel() * tensor.element_size()
            copy = self._block[start : start + size].view(tensor.dtype)
            copy.copy_(tensor.detach(), non_blocking=True)
            copies.append((key, copy))
            start = stop
        return copies

    def _allocate(self, size: int) -> Tensor:
        if self._stream is not None:  # pinned: copied by the device itself, at the full rate of the bus
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)  # a 500th of the page faults
        return torch.frombuffer(block, dtype=torch.uint8)
