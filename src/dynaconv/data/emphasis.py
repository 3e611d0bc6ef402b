"""Which images an epoch spends its time on: easy ones are left out by chance, and the rest of them count for more."""

import torch


class Emphasis:
    """The loss of every training image when it was last seen, and what an epoch makes of it.

    An image whose loss was below the mean is easy. A pass leaves each easy image out with the chance `skipped`, and
    counts the loss of those it keeps 1 / (1 - skipped) times: the mean gradient is, but for chance, that of all images.
    What is saved goes into a further pass, so that an epoch has as many images as ever; hard ones come about twice.

    Source: Qin et al., "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning" (arXiv:2303.04947).
    """

    def __init__(self, count: int, skipped: float, device: torch.device) -> None:
        """Prepares for `count` images, none of them seen yet, and a chance of 0 to below 1."""
        self.skipped = skipped
        self.losses = torch.full((count,), torch.inf, device=device)
        self.losses_before = self.losses.clone()
        self.factors = torch.ones(count, device=device)

    def begin_epoch(self) -> None:
        """Must be called before every epoch: it goes by the losses up to here, also if it is begun a second time."""
        self.losses_before.copy_(self.losses)

    def draw(self, generator: torch.Generator, skipping: bool = True) -> list[torch.Tensor]:
        """Draws the passes of the epoch.

        Args:
            generator: On the CPU.
            skipping: False for an epoch of all images, each counted once.

        Returns:
            (M,) int64 places of images for each pass, on the CPU, in a random order; all of them together are as many
            as there are images.
        """
        losses = self.losses_before.cpu()
        seen = losses.isfinite()
        easy = losses < (losses[seen].mean() if skipping and seen.any() else -torch.inf)
        self.factors = torch.where(easy, 1 / (1 - self.skipped), 1.0).to(self.losses.device)
        passes: list[torch.Tensor] = []
        missing = len(losses)
        while missing:
            skipped = easy & (torch.rand(len(losses), generator=generator) < self.skipped)
            order = torch.randperm(len(losses), generator=generator)
            passes.append(order[~skipped[order]][:missing])
            missing -= len(passes[-1])
        return passes

    def weigh(self, losses: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Notes the (B,) losses of the images at (B,) `places`; returns their weighted mean and the (B,) weights."""
        self.losses[places] = losses.detach().float()
        factors = self.factors[places]
        return (losses * factors).sum() / factors.sum(), factors

    def state(self) -> dict[str, torch.Tensor]:
        """Returns copies, on the CPU, of the losses that the rest of a training depends on."""
        return {"losses": self.losses.cpu().clone(), "losses_before": self.losses_before.cpu().clone()}

    def put_back(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on with the losses of a state; raises ValueError if they are not those of as many images."""
        for name, mine in (("losses", self.losses), ("losses_before", self.losses_before)):
            if state[name].shape != mine.shape or state[name].dtype != mine.dtype or state[name].isnan().any():
                raise ValueError(f"{name} of {tuple(state[name].shape)} images, expected {len(mine)}")
            mine.copy_(state[name])
