"""The state of a training between two updates: everything that the rest of it depends on, as tensors and plain facts.

The order of the images and their augmentation are functions of the seed and the epoch (data/batches.py), so that no
generator's history belongs to it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynaconv.errors import UserError
from dynaconv.training.optim import Schedule

OPTIMIZER_STATES = (set[str](), {"momentum"}, {"step", "mean", "square"}, {"step", "exp_avg", "exp_avg_sq"})
"""What optimisers keep of a parameter: nothing yet, Muon of a kernel, its Adam of all else, torch's Adam."""


@dataclass(frozen=True)
class State:
    """A training between two updates.

    Attributes:
        tensors: Weights and running statistics under "model/NAME", the optimiser's under "optimizer/INDEX/NAME".
        facts: What is no tensor, as plain JSON values: how far the training is, the schedule, the finished epochs.
    """

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


def take_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, progress: dict[str, Any]
) -> State:
    """Copies the state of a training; `progress` goes into its facts as it is."""
    tensors = {f"model/{name}": tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    counts: dict[str, dict[str, int]] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{index}/{name}"] = value.detach().cpu().clone()
            else:
                counts.setdefault(str(index), {})[name] = value
    return State(tensors, {**progress, "optimizer": counts, "schedule": schedule.place})


def put_back(state: State, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
    """Makes model, optimiser and schedule those of the state.

    Raises:
        UserError: the state is that of another network or optimiser.
    """
    try:
        weights = {name.removeprefix("model/"): t for name, t in state.tensors.items() if name.startswith("model/")}
        model.load_state_dict(weights)
        optimizer.state.clear()
        for index, parameter in enumerate(_parameters(optimizer)):
            start = f"optimizer/{index}/"
            found = {name.removeprefix(start): t for name, t in state.tensors.items() if name.startswith(start)}
            for name, tensor in found.items():
                if tensor.shape not in ((), parameter.shape) or not tensor.is_floating_point():
                    raise ValueError(f"{start}{name} is {tensor.dtype} of shape {tuple(tensor.shape)}")
                optimizer.state[parameter][name] = tensor.clone().to(parameter.device)
            for name, value in state.facts["optimizer"].get(str(index), {}).items():
                optimizer.state[parameter][name] = whole_number(value, 0)
            if (names := set(optimizer.state[parameter])) not in OPTIMIZER_STATES:
                raise ValueError(f"the optimiser does not keep {', '.join(sorted(names))} of a parameter")
        schedule.go_to(whole_number(state.facts["schedule"], 0))
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise unfit(error) from error


def unfit(error: Exception) -> UserError:
    """Returns the error to raise where a state is not one of the training that it is given to."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"The stored state does not fit the run's recipe ({reason}); one of them was altered.")


def whole_number(value: Any, least: int, most: int = 2**53) -> int:
    """Returns a fact that must be a whole number from `least` to `most`; raises ValueError if it is not."""
    if not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"expected a whole number from {least} to {most}, received {value!r}")
    return value


def number(value: Any) -> float:
    """Returns a fact that must be a finite number, of no more than 2**53; raises ValueError if it is not."""
    if not isinstance(value, int | float) or not abs(value) <= 2**53:
        raise ValueError(f"expected a finite number, received {value!r}")
    return value


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
