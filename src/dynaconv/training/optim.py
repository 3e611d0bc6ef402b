"""The optimisers and their schedules: Adam with a cosine, Muon with a line."""

# torch's own optimisers are made of the functions named _foreach, which have no public names: one launch for a list.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from dynaconv.recipe import OptimSettings
from dynaconv.training.replay import RecordedUpdate

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the polynomial that drives singular values towards one."""


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is made orthogonal, for kernels; Adam for everything else.

    A kernel (O, C, R, R) is seen as a matrix (O, C * R * R). Its update keeps its directions but gets equal singular
    values, so that no direction waits for a larger one. Before each update a kernel is scaled to norm sqrt(O): behind
    it stands batch norm, and only its share beside the shortcut and the kernels it is mixed with counts. Each of the K
    kernels of a block is a matrix of its own.

    Adam's rate is divided by the number of inputs of a linear layer: no output then moves by more than the rate in one
    update, however wide the layer. Without that, the mixing weights run away in the first updates (docs/log.md).

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), as in airbench94_muon.
    Cost: two large products, of the matrix with itself and with a square of its smaller side, and nine of such squares
    with each other; once per update and not per image.
    """

    def __init__(
        self,
        kernels: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        kernel_learning_rate: float = 0.24,
        learning_rate: float = 0.01,
        momentum: float = 0.6,
    ) -> None:
        """Takes the kernels, each (O, C, R, R), and all other parameters."""
        groups: list[dict[str, Any]] = [
            {"params": list(kernels), "lr": kernel_learning_rate},
            {"params": list(others), "lr": learning_rate},
        ]
        super().__init__(groups, {"momentum": momentum, "betas": (0.9, 0.99), "eps": 1e-8})
        self._recorded = RecordedUpdate()

    # torch keeps its compiler away from these, and to that end imports it: 800 modules, one second of every training.
    # They are not compiled here.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every parameter that has a gradient; takes no closure."""
        kernels, others = ([p for p in group["params"] if p.grad is not None] for group in self.param_groups)
        for kernel in kernels:
            if not self.state[kernel]:
                self.state[kernel]["momentum"] = torch.zeros_like(kernel)
        for parameter in others:
            state = self.state[parameter]
            if not state:
                state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
            state["step"] += 1
        # Parameters that had a gradient in every step so far, which is all of them in a network, are updated together.
        by_age: dict[int, list[torch.Tensor]] = {}
        for parameter in others:
            by_age.setdefault(self.state[parameter]["step"], []).append(parameter)
        if len(by_age) == 1:
            self._run(kernels, others, next(iter(by_age)))
            return
        self._run(kernels, [], 1)
        for age, alike in by_age.items():
            self._run([], alike, age)

    def _run(self, kernels: list[torch.Tensor], others: list[torch.Tensor], age: int) -> None:
        """Updates at the rates of this step, the `age`-th of the `others`; on CUDA by a recording."""
        low, high = self.param_groups[1]["betas"]
        rates = (
            self.param_groups[0]["lr"],
            self.param_groups[1]["lr"] / (1 - low**age),  # Adam's averages begin at zero and are the lower for it
            1 / (1 - high**age),
        )
        gradients = [parameter.grad for parameter in (*kernels, *others) if parameter.grad is not None]

        def update(gradients: Sequence[torch.Tensor], rates: Sequence[float | torch.Tensor]) -> None:
            if kernels:
                self._update_kernels(kernels, gradients[: len(kernels)], rates[0])
            if others:
                self._update_others(others, gradients[len(kernels) :], rates[1], rates[2])

        touched = [*kernels, *others, *(t for p in (*kernels, *others) for t in _tensors(self.state[p]))]
        self._recorded.run(update, touched, gradients, rates)

    def _update_kernels(
        self, kernels: list[torch.Tensor], gradients: Sequence[torch.Tensor], rate: float | torch.Tensor
    ) -> None:
        momentum = self.param_groups[0]["momentum"]
        running = [self.state[kernel]["momentum"] for kernel in kernels]
        torch._foreach_mul_(running, momentum)
        torch._foreach_add_(running, list(gradients))
        steps = torch._foreach_add(list(gradients), running, alpha=momentum)
        updates = [
            matrix.view_as(kernel)
            for matrix, kernel in zip(orthogonalize([step.flatten(1) for step in steps]), kernels, strict=True)
        ]
        scales = torch._foreach_norm(kernels)
        torch._foreach_add_(scales, 1e-7)
        torch._foreach_reciprocal_(scales)
        torch._foreach_mul_(scales, [math.sqrt(kernel.shape[0]) for kernel in kernels])
        torch._foreach_mul_(kernels, scales)
        torch._foreach_mul_(updates, rate)
        torch._foreach_sub_(kernels, updates)

    def _update_others(
        self,
        parameters: list[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        rate: float | torch.Tensor,
        correction: float | torch.Tensor,
    ) -> None:
        low, high = self.param_groups[1]["betas"]
        means = [self.state[parameter]["mean"] for parameter in parameters]
        squares = [self.state[parameter]["square"] for parameter in parameters]
        torch._foreach_lerp_(means, list(gradients), 1 - low)
        torch._foreach_lerp_(squares, torch._foreach_mul(list(gradients), list(gradients)), 1 - high)
        spreads = torch._foreach_mul(squares, correction)
        torch._foreach_sqrt_(spreads)
        torch._foreach_add_(spreads, self.param_groups[1]["eps"])
        updates = torch._foreach_div(means, spreads)
        torch._foreach_mul_(updates, rate)
        torch._foreach_div_(updates, [float(p.shape[1]) if p.ndim == 2 else 1.0 for p in parameters])
        torch._foreach_sub_(parameters, updates)


def _tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in state.values() if isinstance(value, torch.Tensor)]


def orthogonalize(matrices: Sequence[torch.Tensor], iterations: int = 3) -> list[torch.Tensor]:
    """Brings the singular values of every matrix, (M, N), near one, and keeps its singular vectors.

    Three iterations leave the values between about 0.3 and 1.2, which serves an optimiser as well as one. Each takes X
    to (a + b X X' + c (X X')^2) X, so that all of them together are a polynomial of the first X X', a small square
    matrix, and there are but two large products. Those squares of all matrices that are of one size go through the
    iterations together. All run in the lower precision under autocast.

    Args:
        matrices: At least one, all of one dtype and on one device; of several shapes.
        iterations: At least 1.

    Returns:
        As many matrices, each of the shape and dtype of its own; upright ones are views of others, transposed.
    """
    device = matrices[0].device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else matrices[0].dtype
    by_shape: dict[torch.Size, list[int]] = {}
    for place, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(place)
    by_side: dict[int, list[torch.Size]] = {}
    for shape in by_shape:
        by_side.setdefault(min(shape), []).append(shape)
    results = list(matrices)
    with torch.autocast(device, enabled=False):
        for shapes in by_side.values():
            starts = [_wide(torch.stack([matrices[place] for place in by_shape[shape]])) for shape in shapes]
            starts = [(each / (each.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(precision) for each in starts]
            polynomials = _polynomials(torch.cat([each @ each.mT for each in starts]), iterations)
            parts = polynomials.split([len(each) for each in starts])
            for shape, start, polynomial in zip(shapes, starts, parts, strict=True):
                found = (polynomial @ start).to(matrices[0].dtype)
                for place, matrix in zip(by_shape[shape], found, strict=True):
                    results[place] = matrix if matrix.shape == shape else matrix.mT
    return results


def _wide(matrices: torch.Tensor) -> torch.Tensor:
    return matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices


def _polynomials(squares: torch.Tensor, iterations: int) -> torch.Tensor:
    """Returns what takes X to the result of that many iterations, for each X X' of (B, M, M)."""
    factor = whole = _factors(squares)
    for _ in range(iterations - 1):
        squares = factor @ squares @ factor
        factor = _factors(squares)
        whole = factor @ whole
    return whole


def _factors(squares: torch.Tensor) -> torch.Tensor:
    """Returns what one iteration multiplies each X by: a + b X X' + c (X X')^2."""
    first, third, fifth = QUINTIC
    factors = torch.baddbmm(squares, squares, squares, beta=third, alpha=fifth)
    factors.diagonal(dim1=1, dim2=2).add_(first)
    return factors


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """Makes the optimiser of the settings over all parameters; Adam in torch's fused form (one pass per step)."""
    if settings.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)
    parameters = list(model.parameters())
    return Muon(
        [parameter for parameter in parameters if parameter.ndim == 4],
        [parameter for parameter in parameters if parameter.ndim != 4],
        settings.kernel_learning_rate,
        settings.learning_rate,
        settings.kernel_momentum,
    )


class Schedule:
    """Lowers the rates of an optimiser to zero over a training, each in proportion.

    Where it stands is one number, so that a training can go on from anywhere.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: OptimSettings, epochs: int, steps: int) -> None:
        """Prepares for `epochs` epochs of `steps` updates each; the linear schedule follows the updates by itself."""
        self._optimizer = optimizer
        self._rates: list[float] = [group["lr"] for group in optimizer.param_groups]
        self._by_epoch = settings.schedule == "cosine"
        self._last = epochs if self._by_epoch else epochs * steps
        self.place = 0
        self._scale = 1.0
        if not self._by_epoch:
            optimizer.register_step_post_hook(self._follow)

    def end_epoch(self) -> None:
        """Must be called after every epoch."""
        if self._by_epoch:
            self.go_to(self.place + 1)

    def go_to(self, place: int) -> None:
        """Sets the rates of a place: the epochs that have ended for a cosine, the updates for a line."""
        self.place = place
        share = min(1.0, place / self._last)
        factor = (1 + math.cos(math.pi * share)) / 2 if self._by_epoch else 1 - share
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor * self._scale

    def scale(self, factor: float) -> None:
        """Multiplies all rates by `factor` from here on, in place of any factor before."""
        self._scale = factor
        self.go_to(self.place)

    def _follow(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.go_to(self.place + 1)
