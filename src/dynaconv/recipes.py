"""The named recipes: functions that return a complete Recipe, each with its command, cost and measured result."""

from collections.abc import Callable

from dynaconv.recipe import Recipe


def coursework() -> Recipe:
    """The coursework system: six mixed blocks, Adam, cosine annealing, 50 epochs, batches of 75 and 50.

    RandomAffine also mirrors, unlike the coursework's; `--flip 0` leaves it out (docs/decisions/0008-mirror.md).

    Command: dynaconv train coursework --data cifar10
    Cost: 67 minutes on one core with AVX2, another run on the other core (median epoch: 78 seconds); 1.0 GB of memory.
    Result on CIFAR-10: 87.67% of the test images, 88.29% of the validation images, 2 seeds
    (benchmarks/results/coursework.json).
    """
    return Recipe(name="coursework")


RECIPES: dict[str, Callable[[], Recipe]] = {"coursework": coursework}
"""Every recipe by name."""

DEFAULT = "coursework"
"""The recipe of `dynaconv train` without a name."""
