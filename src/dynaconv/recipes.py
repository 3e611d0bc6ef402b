"""The named recipes: functions that return a complete Recipe, each with its command, cost and measured result."""

from collections.abc import Callable

from dynaconv.recipe import Recipe


def coursework() -> Recipe:
    """The coursework system: six mixed blocks, Adam, cosine annealing, 50 epochs, batches of 75 and 50.

    Command: dynaconv train coursework --data cifar10
    Cost: 48 minutes on two cores with AVX2 (median epoch: 57 seconds); 0.9 GB of memory.
    Result on CIFAR-10: 85.24% of the test images, 86.40% of the validation images, 1 seed
    (benchmarks/results/coursework.json).
    """
    return Recipe(name="coursework")


RECIPES: dict[str, Callable[[], Recipe]] = {"coursework": coursework}
"""Every recipe by name."""

DEFAULT = "coursework"
"""The recipe of `dynaconv train` without a name."""
