"""A share of images with the interval of the rate that it estimates; needs no torch."""

import math
from dataclasses import dataclass
from typing import Any

QUANTILE = 1.959963984540054
"""Of the standard normal distribution, at 0.975: for intervals of 95%."""


@dataclass(frozen=True)
class Rate:
    """A share of images, with the 95% interval of the rate that it estimates."""

    count: int
    """Images that have the property."""
    images: int
    """Images looked at, at least 1."""

    @property
    def value(self) -> float:
        """The share, 0 to 1."""
        return self.count / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of Wilson's 95% interval, 0 to 1.

        It never leaves 0 to 1 and holds its 95% for rates near one, where the usual plus and minus does not.
        Source: Wilson (1927), Journal of the American Statistical Association 22:209.

        Example:
            >>> "{:.4f} to {:.4f}".format(*Rate(90, 100).interval)
            '0.8256 to 0.9448'
        """
        n, share, z = self.images, self.value, QUANTILE
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        margin = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        # Exact at the ends, which rounding would miss.
        return (0.0 if self.count == 0 else middle - margin), (1.0 if self.count == n else middle + margin)

    def as_dict(self) -> dict[str, Any]:
        """Returns value, interval and counts as JSON values."""
        return {"value": self.value, "interval": list(self.interval), "count": self.count, "images": self.images}
