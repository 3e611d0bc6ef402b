"""Training passes on CUDA, recorded once per shape and replayed: a small network spends most of a step on launches."""

import logging

import torch
from torch import nn

RECORDED_AFTER = 3
"""Passes of a shape that run as they are before it is recorded: a rare shape, like that of a last batch, never is."""


class Replayed(nn.Module):
    """Runs a network in training mode through CUDA graphs of its forward and backward pass, one for each input shape.

    The results are those of the network. In evaluation mode, elsewhere than on CUDA, and where recording fails, the
    network runs as it is. What a graph reads and writes stays allocated as long as this object.
    """

    def __init__(self, network: nn.Module) -> None:
        """Takes the network, on its device; its parameters must stay where they are in memory."""
        super().__init__()
        self.network = network
        self._seen: dict[torch.Size, int] = {}
        self._recorded: dict[torch.Size, nn.Module] = {}
        self._works = True

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps what the network maps."""
        # A graph leaves its gradients where it left those before: they can begin a sum, but not be added to one.
        adds_up = next(self.network.parameters()).grad is not None
        if adds_up or not (self.training and self._works and images.is_cuda):
            return self.network(images)
        recorded = self._recorded.get(images.shape)
        if recorded is None:
            self._seen[images.shape] = self._seen.get(images.shape, 0) + 1
            if self._seen[images.shape] <= RECORDED_AFTER:
                return self.network(images)
            recorded = self._record(images)
        return recorded(images)

    def _record(self, images: torch.Tensor) -> nn.Module:
        """Returns the pass for images of this shape, recorded; the network itself where it cannot be."""
        # Recording runs the network a few times, which moves the running statistics of batch norm.
        before = [buffer.clone() for buffer in self.network.buffers()]
        try:
            recorded = torch.cuda.make_graphed_callables(_Pass(self.network), (images.clone(),))
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            logging.getLogger(__name__).warning("CUDA graphs are not used: %s", error)
            self._works = False
            return self.network
        finally:
            for buffer, value in zip(self.network.buffers(), before, strict=True):
                buffer.copy_(value)
        self._recorded[images.shape] = recorded
        return recorded


class _Pass(nn.Module):
    """A network under another name, whose forward method can be exchanged without exchanging that of the network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)
