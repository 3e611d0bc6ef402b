"""The named recipes: functions that return a complete Recipe, each with its command, cost and measured result."""

from collections.abc import Callable

from dynaconv.recipe import Recipe


def coursework() -> Recipe:
    """The coursework system: five mixed blocks, Adam, cosine annealing, 50 epochs, batches of 75 and 50.

    Command: dynaconv train coursework --data cifar10
    Cost: 61 minutes on two cores with AVX2 (median epoch: 73 seconds); 1.1 GB of memory.
    Result on CIFAR-10: 87.47% of the test images, 87.72% of the validation images, 1 seed
    (benchmarks/results/coursework.json).
    """
    return Recipe(name="coursework")


RECIPES: dict[str, Callable[[], Recipe]] = {"coursework": coursework}
"""Every recipe by name."""

DEFAULT = "coursework"
"""The recipe of `dynaconv train` without a name."""
