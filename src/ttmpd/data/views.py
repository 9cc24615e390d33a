"""Augmented views of prepared image batches: random for baselines, fixed by seed for one-time labels."""

import torch
from torch import Tensor
from torch.nn import functional as F


def crop_boxes(n: int, generator: torch.Generator, scale: tuple[float, float]) -> Tensor:
    """Random-resized-crop boxes and flips: (n, 5) of height, width, center y, center x (-1..1) and flip (+1 or -1).

    Source: the area is uniform in ``scale`` and the aspect ratio log-uniform in 3/4..4/3, as in torchvision.
    """
    area = torch.empty(n).uniform_(*scale, generator=generator)
    ratio = torch.exp(torch.empty(n).uniform_(-0.2877, 0.2877, generator=generator))
    height, width = (area / ratio).sqrt().clamp(max=1.0), (area * ratio).sqrt().clamp(max=1.0)
    place = torch.empty(n, 2).uniform_(-1.0, 1.0, generator=generator)
    flip = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1.0
    return torch.stack([height, width, place[:, 0] * (1 - height), place[:, 1] * (1 - width), flip], dim=1)


def cropped(batch: Tensor, boxes: Tensor) -> Tensor:
    """Each image's box, resized to the image's size (bilinear), mirrored where the box says so."""
    height, width, y, x, flip = boxes.to(batch.device).unbind(1)
    zero = torch.zeros_like(height)
    theta = torch.stack([torch.stack([width * flip, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(theta, list(batch.shape), align_corners=False)
    return F.grid_sample(batch, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def random_view(batch: Tensor, generator: torch.Generator, scale: tuple[float, float] = (0.08, 1.0)) -> Tensor:
    """A random resized crop and flip of every image; anything that is not an image stays as it is."""
    return cropped(batch, crop_boxes(len(batch), generator, scale)) if batch.dim() == 4 else batch


def fixed_view(
    batch: Tensor, index: Tensor, view: int, seed: int, n_samples: int, smallest_crop: float = 1.0
) -> Tensor:
    """View number ``view`` of the samples at ``index``; equal arguments give equal pixels.

    View 0 is the sample itself. The others are mirrored by chance and shifted by up to an eighth of the side (whole
    pixels, mirrored at the border), which keeps small images sharp. Where crops may be smaller than the image, every
    odd view is a random resized crop instead, which varies more.

    Args:
        batch: (B, C, H, W) the prepared samples; anything else is returned as it is.
        index: (B,) positions of the samples among all ``n_samples``.
        view: number of the view.
        seed: of the run.
        n_samples: how many samples there are in all.
        smallest_crop: the smallest share of the area that a crop keeps; 1 for no crops.
    """
    if view == 0 or batch.dim() != 4:
        return batch
    generator = torch.Generator().manual_seed(seed * 1009 + view)
    if view % 2 and smallest_crop < 1:
        return cropped(batch, crop_boxes(n_samples, generator, (smallest_crop, 1.0))[index.cpu()])
    reach = torch.tensor([batch.shape[2] // 8, batch.shape[3] // 8])
    shifts = (torch.rand(n_samples, 2, generator=generator) * (2 * reach + 1)).long()[index.cpu()]
    flips = (torch.rand(n_samples, generator=generator) < 0.5)[index.cpu()]
    pad_y, pad_x = int(reach[0]), int(reach[1])
    padded = F.pad(batch, (pad_x, pad_x, pad_y, pad_y), mode="reflect")
    crops = [
        padded[i, :, dy : dy + batch.shape[2], dx : dx + batch.shape[3]].flip(-1 if flip else ())
        for i, ((dy, dx), flip) in enumerate(zip(shifts.tolist(), flips.tolist(), strict=True))
    ]
    return torch.stack(crops)
