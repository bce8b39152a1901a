"""Networks that know how sure they are: logits f(x, z) of an input and an epistemic index z, whose distribution is part of
the network (Osband et al. 2023, "Epistemic Neural Networks", section 2). What all indices agree on is known; where they
differ, more data would tell. The epinet of that paper is here, what it is compared with in `ensembles`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayproj import keyed


class EpistemicKind(Enum):
    none = "none"  # a point estimate
    epinet = "epinet"
    ensemble = "ensemble"  # of networks; with `prior` of networks plus fixed random ones (Osband et al. 2018)
    mc_dropout = "mc_dropout"  # Gal and Ghahramani 2016
    batch_ensemble = "batch_ensemble"  # Wen et al. 2020


class Bootstrap(Enum):
    """How much an example counts for an index: at random but for ever, so that each index learns from other data."""

    none = "none"
    bernoulli = "bernoulli"  # twice or not at all
    exponential = "exponential"  # as the Bayesian bootstrap (Rubin 1981)


@dataclass
class EpistemicConfig:
    """What makes a classifier an epistemic network."""

    kind: EpistemicKind = EpistemicKind.none
    index: int = 20  # of an epinet: dimensions of z ~ N(0, I)
    hidden: tuple[int, ...] = (50,)  # of an epinet: widths of its layers; (): a linear hypermodel of the head
    prior: float = 1.0  # of an epinet and an ensemble: scale of the fixed random part; 0: none
    conv_prior: float = 0.0  # of an epinet: scale of fixed random convolutional networks of the image itself; 0: none
    mlp_prior: float = 0.0  # the same of multilayer perceptrons of its pixels, for small images; 0: none
    # Of an epinet: whether its base, where that is trained, learns nothing through its features.
    stop_gradient: bool = True
    temperature: float = 1.0  # of an epinet: what its base's logits are divided by
    # Of an epinet: what it is multiplied by, priors and all, before it is added to its base's logits.
    scale: float = 1.0
    members: int = 10  # of an ensemble and a batch ensemble
    dropout: float = 0.1  # of mc_dropout: share of the channels that are left out before every layer
    samples: int = 8  # of an epinet: indices of each example in a step of training
    bootstrap: Bootstrap = Bootstrap.none  # of an epinet, an ensemble and a batch ensemble
    predict: int = 100  # of an epinet and mc_dropout: indices of a prediction, where it is not said otherwise

    def problems(self) -> list[str]:
        positive = ("index", "members", "samples", "predict")
        found = [f"epistemic.{name} must be positive." for name in positive if getattr(self, name) < 1]
        if any(width < 1 for width in self.hidden):
            found.append("epistemic.hidden are widths, each at least 1.")
        if not 0 <= self.dropout < 1:
            found.append(f"epistemic.dropout must lie in [0, 1), not {self.dropout:g}.")
        if min(self.prior, self.conv_prior, self.mlp_prior) < 0:
            found.append("epistemic.prior, conv_prior and mlp_prior must not be negative.")
        if min(self.temperature, self.scale) <= 0:
            found.append("epistemic.temperature and scale must be positive.")
        if self.kind in (EpistemicKind.none, EpistemicKind.mc_dropout) and self.bootstrap is not Bootstrap.none:
            kinds = "an epinet, an ensemble or a batch_ensemble"
            found.append(f"epistemic.bootstrap is for {kinds}, not for {self.kind.value}.")
        return found


class Base(Protocol):
    """A network that ends in a linear layer over features: what an epinet can be put on. Its logits are
    `classify(pooled(images))`."""

    @property
    def head(self) -> nn.Linear: ...

    def pooled(self, images: Tensor) -> Tensor:
        """Features [B, head.in_features] of images uint8 [B, C, H, W]."""
        ...

    def classify(self, pooled: Tensor) -> Tensor:
        """Logits [B, classes] of features."""
        ...


class EpistemicNetwork(nn.Module):
    """Logits of images for indices. The work that does not depend on the index is `encode`, done once for many of them.

    Indices are fp32 [Z, B, D], or [Z, 1, D] where all images share them.
    """

    def training_indices(self, seed: int, row: Tensor) -> Tensor:
        """Of each example of a step of training, keyed by its row: [Z, B, D]."""
        raise NotImplementedError

    def indices(self, count: int, seed: int = 0) -> Tensor:
        """Draws of the index, shared by all images: [count, 1, D]; of finitely many, each of them once."""
        raise NotImplementedError

    def quantiles(self, seed: int, example: Tensor, z: Tensor) -> Tensor:
        """[Z, B] of a training set's examples, int64 [B], and indices: each uniform in [0, 1), for ever the same of an
        example and an index, and of an example as alike as the indices are."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Any:
        """What `decode` needs of images uint8 [B, C, H, W]."""
        raise NotImplementedError

    def decode(self, encoded: Any, z: Tensor) -> Tensor:
        """Logits fp32 [Z, B, classes]."""
        raise NotImplementedError

    def fixed(self) -> set[str]:
        """Names of the parameters that are never trained."""
        return set()

    @property
    def default_indices(self) -> int:
        """How many indices a prediction takes."""
        raise NotImplementedError

    def forward(self, images: Tensor, z: Tensor | None = None) -> Tensor:
        """Logits [Z, B, classes] for indices. Without any: the log of the mean probabilities over the default ones,
        [B, classes], so that the network serves wherever a classifier does."""
        if z is not None:
            return self.decode(self.encode(images), z)
        logits = self.decode(self.encode(images), self.indices(self.default_indices))
        return torch.logsumexp(logits.log_softmax(2), 0) - torch.tensor(float(len(logits))).log()


def weights(bootstrap: Bootstrap, quantiles: Tensor) -> Tensor:
    """How much examples count for indices, of mean one (Osband et al. 2023, section 3.2, "data bootstrapping")."""
    if bootstrap is Bootstrap.bernoulli:
        return 2.0 * (quantiles < 0.5)
    return -torch.log1p(-quantiles.clamp(max=1 - 1e-7))


class ProjectedMLP(nn.Module):
    """g([z, φ])ᵀ z, where g is an MLP to [classes, D] (Osband et al. 2023, eq. 7). Without hidden layers g takes φ alone.

    The index is drawn into the last layer before it meets the examples: for an index that all share this is D times less
    work than to compute g.
    """

    def __init__(self, features: int, classes: int, index: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.of_features = nn.Linear(features, hidden[0]) if hidden else None
        self.of_index = nn.Linear(index, hidden[0], bias=False) if hidden else None
        self.deeper = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(hidden))
        width = hidden[-1] if hidden else features
        self.weight = nn.Parameter(torch.randn(classes, index, width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(classes, index))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):  # of unit gain over all inputs, of which the index is a part
                nn.init.normal_(layer.weight, std=(features + index if layer.in_features != width else width) ** -0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor, z: Tensor) -> Tensor:
        """[Z, B, classes] of features [B, F] and indices [Z, B or 1, D]."""
        x = features[None]
        if self.of_features is not None and self.of_index is not None:
            x = F.relu(self.of_features(features) + self.of_index(z))
        for layer in self.deeper:
            x = F.relu(layer(x))
        if z.shape[1] == 1:
            weight = torch.einsum("zd,cdh->zhc", z[:, 0], self.weight)
            return x @ weight + z @ self.bias.T
        whole = (x @ self.weight.flatten(0, 1).T).unflatten(2, self.bias.shape) + self.bias
        return torch.einsum("zbcd,zbd->zbc", whole, z)


class ConvPrior(nn.Module):
    """As many small random networks of the image as z has dimensions, side by side as groups of one: [B, classes, D]
    (Osband et al. 2023, appendix: the additive prior of its ImageNet epinets, here with kernels for small images)."""

    def __init__(self, image_channels: int, classes: int, index: int, channels: tuple[int, ...] = (4, 8, 8)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs, groups = image_channels, 1
        for width in channels:
            conv = nn.Conv2d(inputs, index * width, 3, stride=2, padding=1, groups=groups)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            layers += [conv, nn.ReLU()]
            inputs, groups = index * width, index
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.head = nn.Conv2d(inputs, index * classes, 1, groups=index)
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)).flatten(1).unflatten(1, (self.index, -1)).transpose(1, 2)


class MLPPrior(nn.Module):
    """As many small random perceptrons of the input as z has dimensions: [B, classes, D] of [B, ...] (ibid., appendix: the
    additive prior of its epinets of the testbed, with the same two layers of five)."""

    def __init__(self, inputs: int, classes: int, index: int, hidden: tuple[int, ...] = (5, 5)) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            torch.randn(index, a, b) * (2 / a) ** 0.5 for a, b in pairwise((inputs, *hidden, classes))
        )

    def forward(self, x: Tensor) -> Tensor:
        first, *deeper = self.weights
        found = torch.einsum("bi,dih->dbh", x.flatten(1), first)
        for weight in deeper:
            found = F.relu(found) @ weight
        return found.permute(1, 2, 0)


class Epinet(EpistemicNetwork):
    """f(x, z) = μ(x) / T + s σ(sg[φ(x)], z) with z ~ N(0, I): a base network's logits, and a small network of its features
    and the index, of which a part is learnt and a part is random for ever (Osband et al. 2023, eq. 4-6). T and s are 1
    unless the config says otherwise.

    Args:
        base: gives logits and features; trained too, or frozen (`trainable: ^epinet`).
        shape: of an image, (channels, height, width), for the priors of the image itself.
    """

    def __init__(self, config: EpistemicConfig, base: Base, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.config = config
        self.base: Any = base
        features, classes, index = base.head.in_features, base.head.out_features, config.index
        self.epinet = ProjectedMLP(features, classes, index, tuple(config.hidden))
        self.prior = ProjectedMLP(features, classes, index, tuple(config.hidden)) if config.prior else None
        self.conv_prior = ConvPrior(shape[0], classes, index) if config.conv_prior else None
        self.mlp_prior = MLPPrior(math.prod(shape), classes, index) if config.mlp_prior else None
        for part in (self.prior, self.conv_prior, self.mlp_prior):
            if part is not None:
                part.requires_grad_(False)

    def fixed(self) -> set[str]:
        priors = ("prior.", "conv_prior.", "mlp_prior.")
        return {name for name, _ in self.named_parameters() if name.startswith(priors)}

    def apart(self) -> dict[str, Tensor]:
        """All but the base: weights and priors by name."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("base.")}

    def options(self) -> dict[str, float]:
        """What it computes with besides its weights."""
        names = ("prior", "conv_prior", "mlp_prior", "temperature", "scale")
        return {name: getattr(self.config, name) for name in names}

    def train(self, mode: bool = True) -> Epinet:
        """A base that is frozen stays as it predicts, without dropout."""
        super().train(mode)
        if not any(p.requires_grad for p in self.base.parameters()):
            self.base.eval()
        return self

    @property
    def default_indices(self) -> int:
        return self.config.predict

    def training_indices(self, seed: int, row: Tensor) -> Tensor:
        drawn = keyed.normal(seed, "index", row, (self.config.samples, self.config.index))
        return drawn.transpose(0, 1)

    def indices(self, count: int, seed: int = 0) -> Tensor:
        row = keyed.places(count, self.epinet.bias.device)
        return keyed.normal(seed, "prediction", row, (1, self.config.index))

    def quantiles(self, seed: int, example: Tensor, z: Tensor) -> Tensor:
        """Φ(cᵀz) with a direction c of each example: uniform over z ~ N(0, I)."""
        direction = F.normalize(keyed.normal(seed, "bootstrap", keyed.of_samples(example), (self.config.index,)), dim=1)
        return torch.special.ndtr((direction * z).sum(2))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits of the base [B, classes], its features [B, F] and what the priors of the image have [B, classes, D]."""
        config, features, random = self.config, self.base.pooled(images), None
        priors = [(config.conv_prior, self.conv_prior), (config.mlp_prior, self.mlp_prior)]
        for scale, prior in priors:
            if prior is not None:
                found = scale * prior((images.float() / 127.5 - 1).to(features.dtype))
                random = found if random is None else random + found
        logits = self.base.classify(features) / config.temperature
        return logits, features.detach() if config.stop_gradient else features, random

    def decode(self, encoded: tuple[Tensor, Tensor, Tensor | None], z: Tensor) -> Tensor:
        logits, features, random = encoded
        z = z.to(features.dtype)
        found = self.epinet(features, z)
        if self.prior is not None:
            found = found + self.config.prior * self.prior(features, z)
        if random is not None:
            found = found + torch.einsum("bcd,zbd->zbc", random, z.expand(-1, len(random), -1))
        return (logits + self.config.scale * found).float()
