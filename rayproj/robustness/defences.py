"""Classifiers that do something at test time: the nine that Croce et al. 2022 ("Evaluating the adversarial robustness of
adaptive test-time defenses") attack, each in a small form, and a few more. They purify the input by optimisation, by an
auxiliary network, by noise or by a generative model, or adapt the classifier's parameters or states (ibid., section 3).

Each works on an example by itself, and draws, if it does, by a generator of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayproj.robustness.ode import StableODE
from rayproj.robustness.oracle import Model, OfUnit, straight_through
from rayproj.robustness.threats import wide


class Defence:
    """A base classifier behind something.

    Args:
        base: logits [B, K] of images fp32 [B, C, H, W] in [0, 1].

    Attributes:
        random: whether the same image may be taken for different things.
        calls_base: whether it calls the base as it is, and not one of its own.
        steps: of what it optimises or integrates; 0 of one that does neither. Another number may be set, for an attacker or
            a curve.
        likeness: for an attacker that matches features, images [B, C, H, W] to [B, K]: how near their features come to those
            of some image of each class. None of one whose features are not known.
    """

    random, calls_base, steps = False, True, 0

    def __init__(self, base: Model) -> None:
        self.base = base
        self.likeness: Model | None = None

    def purify(self, x: Tensor) -> Tensor:
        """What the base is shown in place of `x`."""
        return x

    def __call__(self, x: Tensor) -> Tensor:
        """Logits as deployed, with whatever gradient the code happens to have."""
        return self.base(self.purify(x))

    def surrogate(self, x: Tensor) -> Tensor:
        """Logits for an attacker, whose gradient goes around what has none of use (BPDA)."""
        return self.base(straight_through(self.purify)(x))


class AntiAdversary(Defence):
    """Moves the input by a few steps towards more confidence in what it is taken for anyway (Alfarra et al. 2022,
    "Combating adversaries with anti-adversaries", algorithm 1)."""

    def __init__(self, base: Model, steps: int = 2, step: float = 0.15) -> None:
        super().__init__(base)
        self.steps, self.step = steps, step

    def purify(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            taken_for = self.base(x).argmax(1)
        moved = torch.zeros_like(x)
        for _ in range(self.steps):
            gradient = _gradient(lambda z: F.cross_entropy(self.base(z), taken_for, reduction="none"), x + moved)
            moved = moved - self.step * gradient.sign()
        return x + moved


class Hedge(Defence):
    """Climbs the sum of the losses of all classes, from a random point nearby (Wu et al. 2021, "Attacking adversarial
    attacks as a defense", algorithm 1)."""

    random = True

    def __init__(
        self, base: Model, eps: float = 8 / 255, steps: int = 20, step: float = 4 / 255, seed: int = 0
    ) -> None:
        super().__init__(base)
        self.eps, self.steps, self.step = eps, steps, step
        self.generator = torch.Generator().manual_seed(seed)

    def purify(self, x: Tensor) -> Tensor:
        start = x + self.eps * (2 * torch.rand(x.shape, generator=self.generator).to(x) - 1)
        point = start.clamp(0, 1)
        for _ in range(self.steps):
            gradient = _gradient(lambda z: -self.base(z).log_softmax(1).sum(1), point)
            point = point + self.step * gradient.sign()
            point = torch.minimum(torch.maximum(point, x - self.eps), x + self.eps).clamp(0, 1)
        return point


class AuxiliaryPurifier(Defence):
    """Moves the input to where a discriminator sees nothing adversarial (Hwang et al. 2021, "AID-Purifier").

    Args:
        discriminator: logits [B] of images: how adversarial they look.
    """

    def __init__(
        self, base: Model, discriminator: Model, eps: float = 8 / 255, steps: int = 10, step: float = 2 / 255
    ) -> None:
        super().__init__(base)
        self.discriminator, self.eps, self.steps, self.step = discriminator, eps, steps, step

    def purify(self, x: Tensor) -> Tensor:
        point = x
        for _ in range(self.steps):
            point = point - self.step * _gradient(self.discriminator, point).sign()
            point = torch.minimum(torch.maximum(point, x - self.eps), x + self.eps).clamp(0, 1)
        return point


class OneStep(AuxiliaryPurifier):
    """Takes a single step to where a discriminator sees nothing adversarial, and half of one where that is in doubt (Qian et
    al. 2021, "Improving model robustness with latent distribution locally and globally", inference with manipulation).

    Args:
        eps: length of the step.
        doubt: for probabilities nearer to a half than this.
    """

    def __init__(self, base: Model, discriminator: Model, eps: float = 8 / 255, doubt: float = 0.2) -> None:
        super().__init__(base, discriminator, eps, steps=1)
        self.doubt = doubt

    def purify(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            doubtful = (self.discriminator(x).sigmoid() - 0.5).abs() < self.doubt
        step = torch.where(doubtful, self.eps / 2, self.eps)
        return (x - wide(step, x) * _gradient(self.discriminator, x).sign()).clamp(0, 1)


class SelfSupervised(Defence):
    """Makes two views of the input agree, within the radius at which they agree best (Shi et al. 2021, "Online adversarial
    purification based on self-supervised learning", algorithm 1, with the task of label consistency). The views are shifted
    to the left and to the right, which classifiers know from their training, in place of flips and crops.

    Args:
        radii: how many are tried, each `step` longer than the one before; and none at all.
        pixels: that a view is shifted.
    """

    def __init__(self, base: Model, steps: int = 5, step: float = 4 / 255, radii: int = 10, pixels: int = 1) -> None:
        super().__init__(base)
        self.steps, self.step, self.radii, self.pixels = steps, step, radii, pixels

    def disagreement(self, x: Tensor) -> Tensor:
        """Mean squared difference of the logits of the views, [B]."""
        left, right = (self.base(x.roll(shift, 3)) for shift in (-self.pixels, self.pixels))
        return (left - right).square().mean(1)

    def purify(self, x: Tensor) -> Tensor:
        best = x
        with torch.no_grad():
            least = self.disagreement(x)
        for number in range(1, min(self.radii, self.steps) + 1):  # no point comes farther than its steps
            point, radius = x, number * self.step
            for _ in range(self.steps):
                point = point - self.step * _gradient(self.disagreement, point).sign()
                point = torch.minimum(torch.maximum(point, x - radius), x + radius).clamp(0, 1)
            with torch.no_grad():
                left = self.disagreement(point)
            best, least = torch.where(wide(left < least, x), point, best), torch.minimum(left, least)
        return best


class Contrast(nn.Module):
    """How little the views of an image have in common beside those of other images, in a linear projection of what the head
    of a classifier sees: the loss of SimCLR (Chen et al. 2020, eq. 1) with a fixed set of others. Views are shifted.

    Args:
        network: with `pooled`; it stays as it is.
        clean: fp32 [n, C, H, W] in [0, 1]: images that the projection learns from, and the others.
        pixels: that a view is shifted, to each of four sides.
    """

    others: Tensor

    def __init__(
        self, network: OfUnit, clean: Tensor, steps: int = 200, dim: int = 32, pixels: int = 1, temperature: float = 0.2,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        torch.manual_seed(seed)
        self.network, self.pixels, self.temperature = network, pixels, temperature
        with torch.no_grad():  # the network does not learn, so that what it sees is the same at every step
            seen = torch.stack([network.pooled(view).float() for view in self.views(clean)], 1)
        self.project = nn.Linear(seen.shape[2], dim).to(clean.device)
        optimiser = torch.optim.Adam(self.project.parameters(), lr=3e-3)
        with torch.enable_grad():
            for _ in range(steps):
                some = torch.randperm(len(clean))[:128]
                z = F.normalize(self.project(seen[some]), dim=2)
                loss = self.loss(z[::2], z[1::2].flatten(0, 1)).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        self.project.requires_grad_(False)
        self.register_buffer("others", F.normalize(self.project(seen), dim=2).flatten(0, 1))

    def views(self, x: Tensor) -> list[Tensor]:
        return [x.roll(shift, axis) for axis in (2, 3) for shift in (-self.pixels, self.pixels)]

    def loss(self, z: Tensor, others: Tensor) -> Tensor:
        """[B] of unit vectors of views [B, V, dim] and of other images [n, dim]: the mean over pairs of views i ≠ j of
        -log exp(zᵢ·zⱼ/τ) / (Σ_{k≠i} exp(zᵢ·z_k/τ) + Σ_others exp(zᵢ·o/τ))."""
        alike, same = z @ z.mT / self.temperature, torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
        total = torch.cat([alike.masked_fill(same, -torch.inf), z @ others.T / self.temperature], 2).logsumexp(2)
        return (total[:, :, None] - alike)[:, ~same].mean(1)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.stack([self.project(self.network.pooled(view).float()) for view in self.views(x)], 1)
        return self.loss(F.normalize(z, dim=2), self.others)


class ContrastiveReversal(AuxiliaryPurifier):
    """Moves the input to where its views have more in common than with other images (Mao et al. 2021, "Adversarial attacks
    are reversible with natural supervision", algorithm 1): the same descent, of a `Contrast`."""

    calls_base = False

    def __init__(
        self, base: Model, contrast: Model, eps: float = 16 / 255, steps: int = 10, step: float = 2 / 255
    ) -> None:
        super().__init__(base, contrast, eps, steps, step)


class ClosedLoopControl(Defence):
    """Adds to the image and to what the head sees whatever brings both near the subspaces of clean ones: with
    x₁ = pooled(x₀ + u₀) the controls u minimise Σ ½‖(I - V Vᵀ)(x_t + u_t - μ_t)‖² + c/2 ‖u_t‖² (Chen et al. 2021, "Towards
    robust neural networks via close-loop control", its running loss with linear embeddings), by Adam as in their code. Of
    the states of all layers these two are controlled.

    Args:
        network: the base, as a module of images in [0, 1] with `pooled` and `classify`.
        clean: fp32 [n, C, H, W], from which the subspaces are.
        variance: share of it in a subspace.
        penalty: c.
    """

    calls_base = False

    def __init__(
        self, network: OfUnit, clean: Tensor, steps: int = 10, lr: float = 0.01, variance: float = 0.95,
        penalty: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__(network)
        self.network, self.steps, self.lr, self.penalty = network, steps, lr, penalty
        with torch.no_grad():
            self.spaces = [_subspace(states.flatten(1), variance) for states in (clean, network.pooled(clean))]

    def running_loss(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """What the controls u₀ [B, C, H, W] and u₁ [B, features] are to minimise, [B]."""
        total = self.penalty / 2 * (first.flatten(1).square().sum(1) + second.square().sum(1))
        states = ((x + first).flatten(1), self.network.pooled(x + first) + second)
        for state, (mean, basis) in zip(states, self.spaces, strict=True):
            away = state - mean
            total = total + (away - away @ basis @ basis.T).square().sum(1) / 2
        return total

    def controls(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """u₀ and u₁."""
        found = [torch.zeros_like(x), x.new_zeros(len(x), len(self.spaces[1][0]))]
        optimiser = torch.optim.Adam([u.requires_grad_() for u in found], self.lr)
        for _ in range(self.steps):
            with torch.enable_grad():
                gradients = torch.autograd.grad(self.running_loss(x.detach(), *found).sum(), found)
            for control, gradient in zip(found, gradients, strict=True):
                control.grad = gradient
            optimiser.step()
        return found[0].detach(), found[1].detach()

    def __call__(self, x: Tensor) -> Tensor:
        first, second = self.controls(x)
        return self.network.classify(self.network.pooled(x + first) + second).float()

    def surrogate(self, x: Tensor) -> Tensor:
        return self(x)  # whose gradient takes the controls as given


def _subspace(states: Tensor, variance: float) -> tuple[Tensor, Tensor]:
    """Mean [d] of states [n, d], and the first principal directions [d, k], as many as have this share of the variance."""
    mean = states.mean(0)
    _, sizes, directions = torch.linalg.svd(states - mean, full_matrices=False)
    share = sizes.square().cumsum(0) / sizes.square().sum()
    return mean, directions[: int((share < variance).sum()) + 1].T


class SmallDiscriminator(nn.Module):
    """How adversarial images look, [B]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        stages = [nn.Conv2d(channels, 16, 3, 2, 1), nn.SiLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.SiLU()]
        self.features, self.head = nn.Sequential(*stages), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))[:, 0]  # type: ignore[no-any-return]


def trained_discriminator(clean: Tensor, attacked: Tensor, steps: int = 200, seed: int = 0) -> SmallDiscriminator:
    """Tells images [n, C, H, W] in [0, 1] from what an attack made of them."""
    torch.manual_seed(seed)
    found = SmallDiscriminator(clean.shape[1]).to(clean.device)
    x, is_attacked = torch.cat([clean, attacked]), torch.cat([torch.zeros(len(clean)), torch.ones(len(attacked))])
    optimiser = torch.optim.Adam(found.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(steps):
            batch = torch.randint(len(x), (128,), generator=generator)
            loss = F.binary_cross_entropy_with_logits(found(x[batch]), is_attacked[batch].to(x))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return found.eval().requires_grad_(False)


class EntropyAdaptation(Defence):
    """Adapts scale and shift of the norms to each input, by steps that lessen the entropy of the prediction (Wang et al.
    2021, "Fighting gradients with gradients: dynamic defenses against adversarial attacks", with an episode for each
    example).

    Args:
        network: the base, as a module of images in [0, 1].
    """

    calls_base = False

    def __init__(self, network: nn.Module, steps: int = 6, lr: float = 0.1) -> None:
        super().__init__(network)
        self.network, self.steps, self.lr = copy.deepcopy(network).eval(), steps, lr
        norms = [n for n, m in self.network.named_modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm)]
        known = {name: p.detach() for name, p in self.network.named_parameters()}
        self.adapted = {n: p for n, p in known.items() if n.rpartition(".")[0] in norms}
        self.fixed = {n: p for n, p in known.items() if n not in self.adapted}

    def __call__(self, x: Tensor) -> Tensor:
        def logits(own: dict[str, Tensor], image: Tensor) -> Tensor:
            return torch.func.functional_call(self.network, {**self.fixed, **own}, (image[None],))[0]

        def entropy(own: dict[str, Tensor], image: Tensor) -> Tensor:
            p = logits(own, image).log_softmax(0)
            return -(p.exp() * p).sum()

        own = {name: tensor.expand(len(x), *tensor.shape) for name, tensor in self.adapted.items()}
        for _ in range(self.steps):
            gradient = torch.func.vmap(torch.func.grad(entropy))(own, x)
            own = {name: tensor - self.lr * gradient[name] for name, tensor in own.items()}
        return torch.func.vmap(logits)(own, x)

    def surrogate(self, x: Tensor) -> Tensor:
        return self.base(x)


class RandomNoise(Defence):
    """Takes the mean prediction over noisy copies (Cohen et al. 2019, "Certified adversarial robustness via randomized
    smoothing", without its certificate)."""

    random = True

    def __init__(self, base: Model, sigma: float = 0.1, copies: int = 4, seed: int = 0) -> None:
        super().__init__(base)
        self.sigma, self.copies = sigma, copies
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        found = [
            self.base(x + self.sigma * torch.randn(x.shape, generator=self.generator).to(x)).log_softmax(1)
            for _ in range(self.copies)
        ]
        return torch.stack(found).logsumexp(0)

    def surrogate(self, x: Tensor) -> Tensor:
        return self(x)


class GenerativePurifier(Defence):
    """Shows the base what a generative model makes of the noised input (Nie et al. 2022, "Diffusion models for adversarial
    purification", eq. 4).

    Args:
        redrawn: images [B, C, H, W] in [0, 1] and a seed to images, such as `Redraw` of `rayproj.robustness.job`.
    """

    random = True

    def __init__(self, base: Model, redrawn: Callable[[Tensor, int], Tensor], seed: int = 0) -> None:
        super().__init__(base)
        self.redrawn, self.seed = redrawn, seed

    def purify(self, x: Tensor) -> Tensor:
        self.seed += 1
        with torch.no_grad():
            return self.redrawn(x, self.seed)


class ScorePurifier(Defence):
    """Takes the mean logits over noisy copies, each of which has climbed the score of noised images (Yoon et al. 2021,
    "Adversarial purification with score-based generative models", ADP): x ← x + αs(x) without noise, where α takes a share
    `rate` of the way along s to where s has no part in that direction any more, by a difference over `NEAR`; α is bounded,
    and an image stays where it is once α is no more than `stop`, as in the published code. As in the attack of Croce et al.
    2022 the gradient goes through the scores; noise and α are constants.

    Args:
        score: of images [B, C, H, W], such as `rayproj.robustness.score.ScoreNetwork`.
        sigma: standard deviation of the noise.
        rate: λ.
    """

    random = True
    NEAR, BOUNDS = 1e-3, (1e-5, 0.1)

    def __init__(
        self, base: Model, score: Callable[[Tensor], Tensor], sigma: float = 0.25, steps: int = 10, copies: int = 10,
        rate: float = 0.05, stop: float = 1e-3, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(base)
        self.score, self.sigma, self.steps, self.copies = score, sigma, steps, copies
        self.rate, self.stop = rate, stop
        self.generator = torch.Generator().manual_seed(seed)

    def purify(self, x: Tensor) -> Tensor:
        noisy = x + self.sigma * torch.randn(x.shape, generator=self.generator).to(x)
        point = x + (noisy.clamp(0, 1) - x).detach()
        goes_on = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for _ in range(self.steps):
            score = self.score(point)
            length = self.length(point.detach(), score.detach())
            goes_on = goes_on & (length > self.stop)
            point = (point + wide(length * goes_on, x) * score).clamp(0, 1)
        return point

    def length(self, x: Tensor, score: Tensor) -> Tensor:
        """α [B] at images: λδ / (1 - s(x)·s(x + δs(x)) / ‖s(x)‖²). Of a score that is linear along its own direction, λ
        times the way to its zero."""
        with torch.no_grad():
            ahead = self.score(x + self.NEAR * score)
        along = (score * ahead).flatten(1).sum(1) / score.square().flatten(1).sum(1).clamp(min=1e-20)
        return (self.rate * self.NEAR / (1 - along)).clamp(*self.BOUNDS)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack([self.base(self.purify(x)) for _ in range(self.copies)]).mean(0)

    def surrogate(self, x: Tensor) -> Tensor:
        around = straight_through(self.purify)
        return torch.stack([self.base(around(x)) for _ in range(self.copies)]).mean(0)


class StableEquilibria(Defence):
    """Lets what the head sees flow to an equilibrium of a `StableODE` before it is classified (Kang et al. 2021, SODEF), by
    steps of a length that is fixed. Around it, the gradient takes the flow for a shift.

    Args:
        network: the base, as a module of images in [0, 1] with `pooled`.
    """

    calls_base = False

    def __init__(self, network: OfUnit, ode: StableODE, steps: int = 10) -> None:
        super().__init__(network)
        self.network, self.ode, self.steps = network, ode, steps
        self.likeness = lambda x: ode.likeness(network.pooled(x))

    def __call__(self, x: Tensor) -> Tensor:
        return self._classified(x, self._flow)

    def surrogate(self, x: Tensor) -> Tensor:
        return self._classified(x, straight_through(self._flow))

    def _flow(self, z: Tensor) -> Tensor:
        return self.ode.flow(z, self.steps)

    def _classified(self, x: Tensor, flow: Callable[[Tensor], Tensor]) -> Tensor:
        return self.ode.logits(flow(self.ode.start(self.network.pooled(x))))


class Quantiser(Defence):
    """Rounds the input to a few levels: without a gradient, and without effect once that is gone around."""

    def __init__(self, base: Model, levels: int = 8) -> None:
        super().__init__(base)
        self.levels = levels

    def purify(self, x: Tensor) -> Tensor:
        return (x * (self.levels - 1)).round() / (self.levels - 1)


def _gradient(losses: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of losses [B] by the images, as a constant."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(losses(point).sum(), point)
    return found
