"""What an attack may ask of a classifier, and what it has asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rayproj.robustness.losses import Loss

Model = Callable[[Tensor], Tensor]
"""Images fp32 [B, C, H, W] in [0, 1] to logits [B, K]."""


class Oracle:
    """Logits and gradients of a model, averaged over draws where it is random (expectation over transformation, Athalye et
    al. 2018).

    Args:
        draws: of a random model, for each answer.
        random: whether the same image may be taken for different things.
        votes: of a random model: it is fooled if more than half of so many single answers are wrong.

    Attributes:
        forwards, backwards: examples that went through the model so far.
    """

    def __init__(self, model: Model, draws: int = 1, random: bool = False, votes: int = 1) -> None:
        self.model, self.draws, self.random, self.votes = model, draws, random, votes
        self.forwards = self.backwards = 0

    def logits(self, x: Tensor) -> Tensor:
        """fp32 [B, K]."""
        with torch.no_grad():
            return torch.stack([self._ask(x) for _ in range(self.draws)]).mean(0)

    def fooled(self, x: Tensor, logits: Tensor, label: Tensor) -> Tensor:
        """bool [B]: whether these logits of `x` are wrong, and of a random model also most of further answers: a search
        that ends with the first wrong one finds luck alone."""
        wrong = logits.argmax(1) != label
        if self.random and wrong.any():
            at = torch.nonzero(wrong)[:, 0]
            with torch.no_grad():
                again = torch.stack([self._ask(x[at]).argmax(1) != label[at] for _ in range(self.votes)])
            wrong[at] = again.float().mean(0) > 0.5
        return wrong

    def ask(self, x: Tensor, label: Tensor, target: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [B], their gradients by `x`, and logits [B, K], each the mean over the draws."""
        totals: list[Tensor] = []
        for _ in range(self.draws):
            with torch.enable_grad():
                point = x.detach().requires_grad_()
                logits = self._ask(point)
                losses = loss(logits, label, target)
                gradient = _gradient(losses, point)
            self.backwards += len(x)
            found = [losses.detach(), gradient, logits.detach()]
            totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
        losses, gradient, logits = (total / self.draws if self.draws > 1 else total for total in totals)
        return losses, gradient, logits

    def _ask(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        return self.model(x).float()


def _gradient(losses: Tensor, point: Tensor) -> Tensor:
    """Zero where the model has cut what leads to the images."""
    if not losses.requires_grad:
        return torch.zeros_like(point)
    (found,) = torch.autograd.grad(losses.sum(), point, allow_unused=True)
    return torch.zeros_like(point) if found is None else found


class OfUnit(nn.Module):
    """A network of images in [0, 255] for such in [0, 1], which attacks have."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K] of images fp32 [B, C, H, W]."""
        return self.network(255 * x)  # type: ignore[no-any-return]

    def pooled(self, x: Tensor) -> Tensor:
        """What the network's head sees, [B, features]."""
        return self.network.pooled(255 * x)  # type: ignore[operator, no-any-return]

    def classify(self, pooled: Tensor) -> Tensor:
        return self.network.classify(pooled)  # type: ignore[operator, no-any-return]


@dataclass
class Attacked:
    """What an attack came to.

    Attributes:
        images: fp32 [B, C, H, W]: misclassified where it succeeded, else those of the highest loss.
        broken: bool [B].
        queries: int64 [B]: that a search without gradients asked until then; None of other attacks.
    """

    images: Tensor
    broken: Tensor
    queries: Tensor | None = None


def straight_through(step: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A step without a useful gradient, such as a purifier, as one that counts as the identity backwards (BPDA, Athalye et
    al. 2018)."""

    def through(x: Tensor) -> Tensor:
        with torch.no_grad():
            moved = step(x) - x
        return x + moved

    return through
