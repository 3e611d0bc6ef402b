"""Passes and updates on CUDA, recorded once and replayed: a small network spends most of a step on launches."""

# torch's own optimisers are made of the functions named _foreach, which have no public names.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from dynaconv.recipe import TrainSettings

RECORDED_AFTER = 3
"""Passes of one shape in a row that run as they are before it is recorded: that of a last batch never is."""

Update = Callable[[Sequence[torch.Tensor], Sequence[float | torch.Tensor]], None]
"""Changes tensors in place by gradients and rates."""


def as_trained(network: nn.Module, device: torch.device, settings: TrainSettings) -> nn.Module:
    """Returns what a training runs in place of the network: on CUDA its recorded passes, elsewhere itself."""
    # Deterministic algorithms are looked up while recording, and some of them wait for the host.
    if device.type != "cuda" or settings.deterministic:
        return network
    return Replayed(network, settings.compile)


class Replayed(nn.Module):
    """Runs a network in training mode through CUDA graphs of its forward and backward pass, one for each input shape.

    The results are those of the network. In evaluation mode, elsewhere than on CUDA, and where recording fails, the
    network runs as it is. What a graph reads and writes stays allocated as long as this object.
    """

    def __init__(self, network: nn.Module, compiled: bool = False) -> None:
        """Takes the network, on its device; its parameters must stay where they are in memory.

        `compiled` has torch compile each shape before it is recorded, which takes about 20 seconds: convolutions
        stay what they are, all between them is fused.
        """
        super().__init__()
        self.network = network
        # Every shape gets code of its own, none for any number of images. In a list, lest it be registered once more.
        self._run = [torch.compile(network, dynamic=False) if compiled else network]
        self._last, self._seen = torch.Size(), 0
        self._recorded: dict[torch.Size, nn.Module] = {}
        self._works = True

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps what the network maps."""
        # A graph leaves its gradients where it left those before: they can begin a sum, but not be added to one.
        adds_up = next(self.network.parameters()).grad is not None
        if adds_up or not (self.training and self._works and images.is_cuda):
            return self.network(images)
        self._seen = self._seen + 1 if images.shape == self._last else 1
        self._last = images.shape
        recorded = self._recorded.get(images.shape)
        if recorded is None:
            if self._seen <= RECORDED_AFTER:
                return self.network(images)
            recorded = self._record(images)
        return recorded(images)

    def _record(self, images: torch.Tensor) -> nn.Module:
        """Returns the pass for images of this shape, recorded; the network itself where it cannot be."""
        # What is recorded on a stream of its own hands its gradients to the usual one, which torch warns of in vain.
        if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        # Recording runs the network a few times, which moves the running statistics of batch norm.
        before = [buffer.clone() for buffer in self.network.buffers()]
        recorded = _Pass(self.network, self._run)
        try:
            torch.cuda.make_graphed_callables(recorded, (images.clone(),))  # exchanges its forward method
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            compiled = self._run != [self.network]
            what = "What was asked to be compiled runs as it is" if compiled else "CUDA graphs are not used"
            logging.getLogger(__name__).warning("%s: %s", what, error)
            if compiled:
                self._run = [self.network]  # which is recorded when the shape comes again
            else:
                self._works = False
            return self.network
        finally:
            for buffer, value in zip(self.network.buffers(), before, strict=True):
                buffer.copy_(value)
        self._recorded[images.shape] = recorded
        return recorded


class _Pass(nn.Module):
    """A network under another name, whose forward method can be exchanged without exchanging that of the network."""

    def __init__(self, network: nn.Module, run: list[Callable[[torch.Tensor], torch.Tensor]]) -> None:
        super().__init__()
        self.network = network  # whose parameters get gradients
        self._run = run

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._run[0](images)


class RecordedUpdate:
    """Runs an optimiser's update through a CUDA graph, once it ran a few times as it is. Elsewhere it runs as it is."""

    def __init__(self) -> None:
        """Makes one that has recorded nothing."""
        self._seen = 0
        self._works = True
        self._touched: list[torch.Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(
        self,
        update: Update,
        touched: list[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        rates: Sequence[float],
    ) -> None:
        """Runs `update(gradients, rates)`, which must do the same as before as long as it touches the same tensors.

        Args:
            update: Reads nothing that changes but its arguments and what it touches.
            touched: All tensors that it reads and changes.
            gradients: On the device of `touched`.
            rates: Numbers of this step.
        """
        on_cuda = bool(touched) and touched[0].is_cuda
        if not (on_cuda and self._works) or torch.are_deterministic_algorithms_enabled():
            update(gradients, rates)
            return
        same = len(touched) == len(self._touched) and all(map(lambda a, b: a is b, touched, self._touched))
        if not same:
            self._touched, self._graph, self._seen = touched, None, 0
        self._seen += 1
        if self._graph is None and self._seen > RECORDED_AFTER:
            self._record(update, gradients, rates)
        if self._graph is None:
            update(gradients, rates)
            return
        torch._foreach_copy_(self._gradients, list(gradients))
        self._rates.copy_(torch.tensor(rates), non_blocking=True)
        self._graph.replay()

    def _record(self, update: Update, gradients: Sequence[torch.Tensor], rates: Sequence[float]) -> None:
        self._gradients = [torch.empty_like(gradient) for gradient in gradients]
        self._rates = torch.tensor(rates, device=gradients[0].device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):  # nothing is changed yet
                update(self._gradients, self._rates.unbind())
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            logging.getLogger(__name__).warning("CUDA graphs are not used: %s", error)
            self._works = False
            return
        self._graph = graph
