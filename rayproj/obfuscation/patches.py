"""Adversarial patches (Brown et al. 2017, "Adversarial Patch"), learned against classifiers of this project alone.

A patch makes classifiers say one class whatever the image, in expectation over images and over the drawn size. It is laid
onto the images as `AdversarialPatches` does it, through which the gradient goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rayproj import keyed
from rayproj.obfuscation.composition import framed, laid
from rayproj.obfuscation.learned import AdversarialPatches


def train_patches(
    classifiers: Sequence[Callable[[Tensor], Tensor]],
    images: Tensor,
    targets: Sequence[int],
    side: int,
    steps: int,
    batch: int,
    seed: int,
    told: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Tensor, float]:
    """A patch for each target class.

    Args:
        classifiers: logits of images [B, C, H, W] in [0, 255]; their mean cross-entropy is what is brought down.
        images: uint8 [n, C, H, W].
        side: of a patch, pixels.
        told: called with the step and the loss.

    Returns:
        uint8 [len(targets), C, side, side], and of the images of the last steps the share that was taken for the target.
    """
    device, channels = images.device, images.shape[1]
    row = torch.tensor([[k, 0, 0] for k in range(len(targets))])
    start = keyed.normal(seed, "patches", row, (channels, side, side)).to(device)
    logit = start.mul(0.5).requires_grad_(True)
    optimizer = torch.optim.Adam([logit], 0.1)
    wanted, hits = torch.tensor(list(targets), device=device), []
    for step in range(steps):
        row = torch.tensor([[k, step, 1] for k in range(batch)], device=device)
        drawn = AdversarialPatches.draw(row, seed)
        u = keyed.uniform(seed, "patched images", row, (1,))[:, 0]
        x = framed(images[(u * len(images)).long()], drawn.size)
        number = drawn.patch % len(targets)
        laid_on = laid(x, 255 * torch.sigmoid(logit)[number], drawn.patch_size)
        outputs = [classifier(laid_on) for classifier in classifiers]
        losses = [F.cross_entropy(logits, wanted[number]) for logits in outputs]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hits.append(float(torch.stack([(z.argmax(1) == wanted[number]).float() for z in outputs]).mean()))
        told(step + 1, float(loss.detach()))
    last = hits[-max(1, steps // 10) :]
    return (255 * torch.sigmoid(logit.detach())).round().to(torch.uint8), sum(last) / len(last)
