"""The named recipes: functions that return a complete Recipe, each with its command, cost and measured result."""

from collections.abc import Callable

from dynaconv.recipe import Recipe


def coursework() -> Recipe:
    """The coursework system: six mixed blocks, Adam, cosine annealing, 50 epochs, batches of 75 and 50.

    RandomAffine also mirrors, unlike the coursework's; `--flip 0` leaves it out (docs/decisions/0008-mirror.md).

    Command: dynaconv train coursework --data cifar10
    Cost: 43 minutes on two cores with AVX2 when nothing else runs, 1.1 GB of memory; 59 minutes is the mean of the
    measured runs, two of which shared the machine.
    Result on CIFAR-10: 87.91% of the test images, 88.35% of the validation images, 3 seeds
    (benchmarks/results/coursework.json).
    """
    return Recipe(name="coursework")


RECIPES: dict[str, Callable[[], Recipe]] = {"coursework": coursework}
"""Every recipe by name."""

DEFAULT = "coursework"
"""The recipe of `dynaconv train` without a name."""
