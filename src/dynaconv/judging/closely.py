"""One image looked at closely, in a single forward pass: where it was decided, and how its convolutions were mixed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from dynaconv.model.network import Network


@dataclass(frozen=True)
class Close:
    """What the network did with one image.

    Attributes:
        heat: (H, W) float32, 0 to 1: which places speak for the predicted class. All 0 where none does.
        mixture: For each block with several convolutions, as JSON values: its number from 1, the sides of the kernels
            and the weight of each.
        features: (W,) float32, what the linear layer of the classifier took.
    """

    heat: torch.Tensor
    mixture: list[dict[str, Any]]
    features: torch.Tensor


@torch.no_grad()
def look_closely(network: Network, image: torch.Tensor) -> Close:
    """Runs one image through the network, a block at a time.

    The classifier averages the last maps and is linear in them, so that its weights for the class, laid over the maps,
    are exactly what Grad-CAM computes by a backward pass (Zhou et al., arXiv:1512.04150).

    Args:
        network: In evaluation mode.
        image: (1, C, H, W) float, normalised.
    """
    backbone = network.backbone
    mixture: list[dict[str, Any]] = []
    maps = backbone.run_stem(image)
    for place in range(len(backbone.blocks)):
        block = backbone.block(place)
        if len(block.kernels) > 1:
            weights = block.mixing_weights(maps)[0].float().nan_to_num().tolist()
            sides = [kernel.shape[-1] for kernel in block.kernels]
            mixture.append({"block": place + 1, "kernel_sizes": sides, "weights": weights})
        maps = backbone.run_blocks(maps, place, place + 1)
    features = maps.float().mean((2, 3))[0]
    predicted = int(network.classifier(maps)[0].argmax())
    # Positive evidence for the class, where there is any: as Grad-CAM shows it.
    speaks = network.classifier.linear.weight[predicted].float()
    heat = torch.einsum("c,chw->hw", speaks, maps[0].float()).relu().nan_to_num(posinf=0.0)
    heat = functional.interpolate(heat[None, None], size=image.shape[2:], mode="bilinear", align_corners=False)[0, 0]
    return Close((heat / heat.amax().clamp_min(1e-12)).cpu(), mixture, features.cpu())
