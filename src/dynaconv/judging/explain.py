"""Where in an image a network looks: Grad-CAM, integrated gradients and occlusion, by captum."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynaconv.errors import UserError
from dynaconv.model.network import Network

STEPS = 32
"""Points between the grey image and the image at which the gradient is taken."""
WINDOW_SHARE = 8
"""The occluding square is an eighth of the image's side."""


@dataclass(frozen=True)
class Explanation:
    """For N images, what speaks for and against a class, by three methods that share no idea.

    Attributes:
        grad_cam: (N, H, W) float32, 0 to 1: which places of the last maps speak for the class.
        integrated_gradients: (N, H, W) float32, -1 to 1: what each pixel adds, against a mean grey image.
        occlusion: (N, H, W) float32, -1 to 1: what is lost when a square around the pixel is covered with that grey.
    """

    grad_cam: torch.Tensor
    integrated_gradients: torch.Tensor
    occlusion: torch.Tensor


METHODS = {"grad_cam": "Grad-CAM", "integrated_gradients": "integrated gradients", "occlusion": "occlusion"}
"""Fields of an explanation, each with the name that people know it by."""


def explain(network: Network, images: torch.Tensor, targets: torch.Tensor) -> Explanation:
    """Explains what a network says about images.

    Each map is scaled to a largest absolute value of 1; only its shape counts. None of the three is a proof: where they
    agree, the network looks there.

    Args:
        network: In evaluation mode; left as it was.
        images: (N, C, H, W) float, normalised, on the network's device, at least one.
        targets: (N,) int64, the class of each image to explain.

    Raises:
        UserError: captum is not installed.

    Sources: Selvaraju et al. (arXiv:1610.02391), Sundararajan et al. (arXiv:1703.01365), Zeiler and Fergus
    (arXiv:1311.2901).
    """
    captum: Any = _captum()
    side = images.shape[-1]
    window = max(1, side // WINDOW_SHARE)
    # In float32 and without the shortcuts of autocast: gradients of one image are small.
    with torch.autocast(images.device.type, enabled=False):
        images = images.float()
        cam = captum.LayerGradCam(network, network.backbone).attribute(images, targets, relu_attributions=True)
        cam = nn.functional.interpolate(cam, size=images.shape[2:], mode="bilinear", align_corners=False)
        gradients = captum.IntegratedGradients(network).attribute(
            images, torch.zeros_like(images), targets, n_steps=STEPS, internal_batch_size=max(len(images), 64)
        )
        covered = captum.Occlusion(network).attribute(
            images,
            sliding_window_shapes=(images.shape[1], window, window),
            strides=(images.shape[1], max(1, window // 2), max(1, window // 2)),
            baselines=0,
            target=targets,
        )
    return Explanation(*(_scaled(each.detach().sum(1)) for each in (cam, gradients, covered)))


def overlay(image: torch.Tensor, heat: torch.Tensor, scale: int = 3) -> torch.Tensor:
    """Lays a map over a picture: orange where it speaks for the class, blue where against, the picture in grey.

    Args:
        image: (C, H, W) uint8, C 1 or 3.
        heat: (H, W) float, -1 to 1.
        scale: How many times as large as the image the result is.

    Returns:
        (3, scale * H, scale * W) uint8.
    """
    grey = image.float().mean(0).div(255)
    ground = (0.25 + 0.6 * grey).expand(3, -1, -1)
    # Orange and blue of the Okabe-Ito palette, which people with any colour vision can tell apart.
    ends = torch.tensor([[0.90, 0.62, 0.0], [0.0, 0.45, 0.70]])
    colour = torch.where(heat >= 0, ends[0][:, None, None], ends[1][:, None, None])
    share = heat.abs().clamp(0, 1) * 0.85
    mixed = (1 - share) * ground + share * colour
    large = mixed.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return (255 * large).round().clamp(0, 255).to(torch.uint8)


def _scaled(maps: torch.Tensor) -> torch.Tensor:
    most = maps.abs().amax((1, 2), keepdim=True)
    return (maps / most.clamp_min(1e-12)).float().cpu()


def _captum() -> Any:
    try:
        import captum.attr
    except ImportError as error:
        raise UserError("Explanations need captum; install it: pip install dynaconv[explain].") from error
    return captum.attr
