"""The named recipes: functions that return a complete Recipe, each with its command, cost and measured result."""

from collections.abc import Callable

from dynaconv.recipe import Recipe


def coursework() -> Recipe:
    """The coursework system: Adam, cosine annealing, 50 epochs, batches of 75 and 50.

    Command: dynaconv train coursework --data cifar10
    """
    return Recipe(name="coursework")


RECIPES: dict[str, Callable[[], Recipe]] = {"coursework": coursework}
"""Every recipe by name."""

DEFAULT = "coursework"
