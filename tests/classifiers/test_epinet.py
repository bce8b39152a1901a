"""Epistemic networks against loops written out and closed forms; and what training does to which of their parts."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rayproj.jobs.train_classifier import Config, worker  # type: ignore[attr-defined]
from safetensors import safe_open
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn

from rayproj import classifiers
from rayproj import config as configuration
from rayproj.classifiers.augment import AugmentConfig
from rayproj.classifiers.ensembles import BatchEnsemble, Ensemble, MCDropout
from rayproj.classifiers.epinet import (
    Bootstrap,
    Epinet,
    EpistemicConfig,
    EpistemicKind,
    EpistemicNetwork,
    ProjectedMLP,
    weights,
)
from rayproj.classifiers.model import StartConfig, digest, put_epinet
from rayproj.classifiers.networks import ClassifierConfig, ConvNet, Network, build, centred
from rayproj.classifiers.objective import Loss, Objective, ObjectiveConfig
from rayproj.classifiers.task import ClassificationTask
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.writer import commit_shard
from rayproj.engine.checkpoint import commits, load_ema
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.evaluation.features import EfficientNetLite0Features
from rayproj.evaluation.joint import exact_polyadic_nll, joint_nll, marginal_nll
from rayproj.export import export
from rayproj.keyed import places
from rayproj.storage.store import Store
from rayproj.synthesis.plan import commit_hash
from tests.support.ranks import run_ranks
from tests.support.regression import Recorder

SHAPE, CLASSES = (3, 16, 16), 5
KINDS = [kind for kind in EpistemicKind if kind is not EpistemicKind.none]


def of(kind: EpistemicKind, **values: Any) -> EpistemicNetwork:
    torch.manual_seed(0)
    config = EpistemicConfig(kind, index=6, members=4, samples=3, predict=9, **values)
    built = build(ClassifierConfig(channels=(8, 16), dropout=0.0, epistemic=config), *SHAPE[:2], CLASSES).eval()
    assert isinstance(built, EpistemicNetwork)
    return built


def images(count: int = 7) -> Tensor:
    return torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_many_indices_at_once_are_as_one_by_one(kind: EpistemicKind) -> None:
    """Shared by all images, and each with its own."""
    model, x = of(kind, **({"conv_prior": 0.5, "mlp_prior": 0.5} if kind is EpistemicKind.epinet else {})), images()
    z = model.indices(5)
    together = model(x, z)
    assert together.shape == (len(z), len(x), CLASSES) and together.std(0).max() > 1e-3, "indices make a difference"
    for k in range(len(z)):
        for b in range(len(x)):
            torch.testing.assert_close(model(x[b : b + 1], z[k : k + 1])[0, 0], together[k, b], rtol=1e-4, atol=1e-5)
    own = z.expand(-1, len(x), -1)
    torch.testing.assert_close(model(x, own), together, rtol=1e-4, atol=1e-5)
    rolled = torch.stack([own[:, b].roll(b, 0) for b in range(len(x))], 1)
    expected = torch.stack([together[:, b].roll(b, 0) for b in range(len(x))], 1)
    torch.testing.assert_close(model(x, rolled), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_index_it_is_the_mean_over_the_default_ones(kind: EpistemicKind) -> None:
    model, x = of(kind), images()
    z = model.indices(model.default_indices)
    torch.testing.assert_close(model(x).exp(), model(x, z).softmax(2).mean(0))
    torch.testing.assert_close(model(x).exp().sum(1), torch.ones(len(x)))


@pytest.mark.parametrize("hidden", [(), (50,), (15, 11)])
def test_the_projected_mlp_is_its_formula(hidden: tuple[int, ...]) -> None:
    """relu layers of [z, φ] to a matrix [classes, D], times z: Osband et al. 2023, eq. 7."""
    torch.manual_seed(0)
    mlp, phi, z = ProjectedMLP(8, CLASSES, 6, hidden), torch.randn(3, 8), torch.randn(4, 1, 6)
    nn.init.normal_(mlp.bias)
    for k in range(4):
        for b in range(3):
            h = phi[b]
            if mlp.of_features is not None and mlp.of_index is not None:
                joined = torch.cat([mlp.of_index.weight, mlp.of_features.weight], 1)
                h = F.relu(joined @ torch.cat([z[k, 0], phi[b]]) + mlp.of_features.bias)
            for layer in mlp.deeper:
                h = F.relu(layer(h))
            matrix = mlp.weight @ h + mlp.bias
            torch.testing.assert_close(mlp(phi, z)[k, b], matrix @ z[k, 0], rtol=1e-4, atol=1e-5)


def test_the_index_zero_is_the_base_and_without_layers_it_is_linear() -> None:
    model, x = of(EpistemicKind.epinet, conv_prior=1.0, mlp_prior=1.0), images()
    base: Any = model.base
    torch.testing.assert_close(model(x, torch.zeros(1, 1, 6))[0], base(x))
    model = of(EpistemicKind.epinet, hidden=(), conv_prior=1.0, mlp_prior=1.0)
    z, base = model.indices(2), model.base
    mixed = model(x, 2 * z[:1] - 3 * z[1:])[0] - base(x)
    alone = model(x, z) - base(x)
    torch.testing.assert_close(mixed, 2 * alone[0] - 3 * alone[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.5, 1.6)])
def test_an_epinet_without_layers_is_a_gaussian_process(temperature: float, scale: float) -> None:
    """f(x, z) = μ(x) / T + s Σ z_d (w_d φ(x) + b_d) has the covariance s² Σ (w_d φ + b_d)(w_d φ' + b_d)', so that under a
    probit likelihood the joint probability of labels is that of an orthant."""
    model, x = of(EpistemicKind.epinet, hidden=(), prior=0.7, temperature=temperature, scale=scale), images(3)
    base, config = model.base, model.config  # type: ignore[union-attr]
    epinet, prior = model.epinet, model.prior  # type: ignore[union-attr]
    nn.init.normal_(epinet.bias)  # type: ignore[union-attr,arg-type]
    with torch.no_grad():
        phi = base.pooled(x)  # type: ignore[operator,union-attr]
        factor = sum(
            s * (torch.einsum("dh,bh->bd", m.weight[0], phi) + m.bias[0])  # type: ignore[union-attr,operator]
            for s, m in ((1, epinet), (config.prior, prior))  # type: ignore[union-attr]
        ).double()
        mean = base(x)[:, 0].double() / temperature  # type: ignore[operator]
        latent = model(x, model.indices(20_000))[..., 0].double()
    cov = scale**2 * (factor @ factor.T).numpy()
    assert np.allclose(np.cov(latent.T), cov, atol=0.05 * cov.max())
    log_p = torch.special.log_ndtr(latent)
    exact = -np.log(stats.multivariate_normal(np.zeros(3), cov + np.eye(3)).cdf(mean.numpy()))
    assert joint_nll(log_p.numpy())[0] == pytest.approx(exact, rel=0.03)


def test_no_gradient_reaches_the_base_through_the_epinet_nor_the_priors() -> None:
    model, x = of(EpistemicKind.epinet, conv_prior=1.0, mlp_prior=1.0), images()
    base: Any = model.base
    logits = model(x, model.indices(4))
    part = (logits - base(x)).square().sum()
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("prior", "conv_prior", "mlp_prior")) for name in wanted) and model.fixed()
    gradients = dict(zip(wanted, torch.autograd.grad(part, list(wanted.values())), strict=True))
    assert all(g.abs().max() < 1e-4 for n, g in gradients.items() if n.startswith("base"))
    assert all(g.abs().max() > 1e-3 for n, g in gradients.items() if n.startswith("epinet"))


def test_without_the_stop_the_base_learns_through_its_features() -> None:
    """As by autograd on features that are cut off: what the base gets is that gradient, carried back."""
    model, x = of(EpistemicKind.epinet, stop_gradient=False), images()
    base: Any = model.base
    z = model.indices(4)
    part = (model(x, z) - base(x).detach()).square().sum()
    features = base.pooled(x)
    inner = features.detach().requires_grad_(True)
    decoded = base.classify(inner) + model.epinet(inner, z) + model.prior(inner, z)  # type: ignore[operator]
    (of_features,) = torch.autograd.grad((decoded - base(x).detach()).square().sum(), inner)
    learned = list(base.features.parameters())
    carried = torch.autograd.grad(features, learned, of_features)
    for found, expected in zip(torch.autograd.grad(part, learned), carried, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    stopped = of(EpistemicKind.epinet)
    torch.testing.assert_close(stopped(x, z), model(x, z))


def test_the_perceptrons_of_a_prior_are_as_written() -> None:
    """Two relu layers of five of the pixels in [-1, 1], one perceptron for each dimension of z."""
    model, x = of(EpistemicKind.epinet, prior=0.0, mlp_prior=0.3, scale=2.0), images()
    z = model.indices(3)
    prior: Any = model.mlp_prior
    pixels = x.float() / 127.5 - 1
    random = sum(z[:, :, d, None] * one(prior, pixels, d) for d in range(6))
    epinet: Any = model.epinet
    with torch.no_grad():
        epinet.weight.zero_()
    base: Any = model.base
    torch.testing.assert_close(model(x, z), base(x) + 2 * 0.3 * random, rtol=1e-4, atol=1e-5)
    assert random.std() > 0.1  # type: ignore[union-attr]


def one(prior: Any, x: Tensor, d: int) -> Tensor:
    first, second, third = (weight[d] for weight in prior.weights)
    return F.relu(F.relu(x.flatten(1) @ first) @ second) @ third


def test_an_ensemble_is_its_members() -> None:
    model, x = of(EpistemicKind.ensemble, prior=0.5), images()
    assert isinstance(model, Ensemble) and len(model.members) == 4
    expected = torch.stack([m(x) + 0.5 * p(x) for m, p in zip(model.members, model.priors, strict=True)])
    torch.testing.assert_close(model(x, model.indices(4)), expected)
    torch.testing.assert_close(model.first(2)(x).exp(), expected[:2].softmax(2).mean(0))
    torch.testing.assert_close(model(x, torch.full((1, 1, 4), 0.25))[0], expected.mean(0))
    single = ConvNet(ClassifierConfig(channels=(8, 16)), 3, CLASSES).eval()
    torch.testing.assert_close(Ensemble([single])(x).exp(), single(x).softmax(1))


def test_dropout_is_a_mask_before_every_layer_but_the_first() -> None:
    model, x = of(EpistemicKind.mc_dropout, dropout=0.4), images()
    assert isinstance(model, MCDropout)
    z = model.indices(2000)
    assert z.unique().tolist() == pytest.approx([0, 1 / 0.6]) and z.mean() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(model(x, torch.ones_like(z[:1]))[0], model.base(x))
    masks, h = list(z[3, 0].split(model.widths)), centred(x, torch.float32)
    for number, layer in enumerate(model.base.features):
        if isinstance(layer, nn.Conv2d) and number:
            h = h * masks.pop(0)[None, :, None, None]
        h = layer(h)
    torch.testing.assert_close(model(x, z[3:4])[0], model.base.head(h.mean((2, 3)) * masks.pop(0)))
    assert not masks


def test_a_batch_ensemble_is_networks_whose_weights_differ_by_rank_one() -> None:
    model, x = of(EpistemicKind.batch_ensemble), images()
    assert isinstance(model, BatchEnsemble)
    for member in range(4):
        h = centred(x, torch.float32)
        for layer in [*model.base.features, model.base.head]:
            if hasattr(layer, "inputs"):
                outer = torch.outer(layer.outputs[member], layer.inputs[member])
                weight, bias = layer.layer.weight, layer.bias[member]
                if weight.ndim == 4:
                    h = F.conv2d(h, weight * outer[:, :, None, None], bias, layer.layer.stride, layer.layer.padding)
                else:
                    h = F.linear(h.mean((2, 3)), weight * outer, bias)
            else:
                h = layer(h)
        torch.testing.assert_close(model(x, model.indices(4))[member], h, rtol=1e-4, atol=1e-5)


def scale(layer: Any, outputs: Tensor, inputs: Tensor) -> None:
    """The weights of a layer whose channels are scaled; a depthwise convolution has one input for each output."""
    deep = getattr(layer, "groups", 1) > 1
    factor = (outputs * inputs)[:, None] if deep else torch.outer(outputs, inputs)
    layer.weight.data *= factor.view(*factor.shape, *[1] * (layer.weight.ndim - 2))


OTHERS = [
    ClassifierConfig(Network.wide_resnet, depth=10, width=1),
    ClassifierConfig(Network.vit, layers=2, dim=24, heads=3, patch=4),
    ClassifierConfig(Network.efficientnet_lite0),
]


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config.network.value)
def test_a_batch_ensemble_of_any_network(config: ClassifierConfig) -> None:
    """Each member is a plain network with its own weights put in."""
    torch.manual_seed(0)
    base, x = build(config, 3, 32, CLASSES).eval(), images(3).repeat(1, 1, 2, 2)
    model = BatchEnsemble(EpistemicConfig(EpistemicKind.batch_ensemble, members=3), copy.deepcopy(base)).eval()
    of_members = model(x, model.indices(3))
    state = dict(model.base.state_dict())
    for member in range(3):
        plain = copy.deepcopy(base)
        for name, layer in plain.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                scale(layer, state[f"{name}.outputs"][member], state[f"{name}.inputs"][member])
                if layer.bias is not None:
                    layer.bias.data = state[f"{name}.bias"][member]
        torch.testing.assert_close(of_members[member], plain(x), rtol=1e-3, atol=1e-4)
    assert (of_members[0] - of_members[1]).abs().max() > 1e-2


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config.network.value)
def test_dropout_of_any_network(config: ClassifierConfig) -> None:
    """Of an image and index what a network has whose weights from the left-out channels are zero."""
    torch.manual_seed(0)
    base, x = build(config, 3, 32, CLASSES).eval(), images(3).repeat(1, 1, 2, 2)
    model = MCDropout(EpistemicConfig(EpistemicKind.mc_dropout, dropout=0.3), copy.deepcopy(base)).eval()
    z = model.indices(2)
    layers = [layer for layer in base.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    masks = z[1, 0].split([layer.weight.shape[1] * getattr(layer, "groups", 1) for layer in layers[1:]])
    for layer, mask in zip(layers[1:], masks, strict=True):
        scale(layer, torch.ones(len(layer.weight)), mask)
    torch.testing.assert_close(model(x, z)[1], base(x), rtol=1e-3, atol=1e-4)
    assert (model(x, z)[0] - model(x, z)[1]).abs().max() > 1e-2


class OnEfficientNet(nn.Module):
    """A network of others as a base: features of a package, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.extractor, self.head = EfficientNetLite0Features(32), nn.Linear(1280, CLASSES)

    def pooled(self, x: Tensor) -> Tensor:
        return self.extractor(x)

    def classify(self, pooled: Tensor) -> Tensor:
        return self.head(pooled)


def test_any_network_with_a_linear_head_is_a_base() -> None:
    base, x = OnEfficientNet().eval(), images(2)
    model = Epinet(EpistemicConfig(EpistemicKind.epinet), base, SHAPE)
    torch.testing.assert_close(model(x, torch.zeros(1, 1, 20))[0], base.head(base.pooled(x)))
    assert model(x, model.indices(30)).std(0).min() > 0


def header(samples: int = 40, side: int = 16, name: str = "x") -> Header:
    fields = {"image": Field("png", (3 if side == 16 else 1, side, side)), "label": Field("int")}
    return Header(name, fields, samples, 100, tuple("abcde" if side == 16 else "0123456789"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", [Loss.cross_entropy, Loss.focal])
def test_losses_are_means_over_the_indices_of_each_example_by_itself(kind: EpistemicKind, loss: Loss) -> None:
    config = ClassifierConfig(
        channels=(8, 16), dropout=0.0, epistemic=EpistemicConfig(kind, index=6, members=4, samples=3)
    )
    task = ClassificationTask(config, header(), 3, objective=Objective(ObjectiveConfig(loss)))
    model, row = task.build(), places(7) + torch.tensor([10, 5, 0])
    batch = {"image": images(), "label": torch.arange(7) % CLASSES, "row": row}
    losses = task.losses(model, batch)
    assert losses.shape == (7,)
    some = torch.tensor([4, 1])
    part = task.losses(model, {name: tensor[some] for name, tensor in batch.items()})
    torch.testing.assert_close(part, losses[some], rtol=1e-4, atol=1e-5)
    again = task.losses(model, batch | {"row": row + torch.tensor([0, 1, 0])})
    task.augment.shift, task.augment.flip = 0, False
    still = task.losses(model, batch)
    z = model.training_indices(3, row)  # type: ignore[operator]
    assert kind is EpistemicKind.ensemble or not torch.equal(z, model.training_indices(3, row + 1))  # type: ignore[operator]
    p = model(batch["image"], z).softmax(2).gather(2, batch["label"].expand(len(z), 7)[..., None])[..., 0]
    expected = -p.log() * ((1 - p) ** 2 if loss is Loss.focal else 1)
    torch.testing.assert_close(still, expected.mean(0), rtol=1e-4, atol=1e-5)
    assert not torch.equal(again, losses), "another step has other indices and changes of the images"


@pytest.mark.parametrize("kind", [EpistemicKind.epinet, EpistemicKind.ensemble, EpistemicKind.batch_ensemble])
@pytest.mark.parametrize("bootstrap", [Bootstrap.bernoulli, Bootstrap.exponential])
def test_each_index_learns_from_other_data(kind: EpistemicKind, bootstrap: Bootstrap) -> None:
    epistemic = EpistemicConfig(kind, index=6, members=4, samples=3, bootstrap=bootstrap)
    config = ClassifierConfig(channels=(8, 16), dropout=0.0, epistemic=epistemic)
    task = ClassificationTask(config, header(), 3, AugmentConfig(shift=0, flip=False))
    model, row = task.build(), places(7) + torch.tensor([10, 5, 0])
    batch = {"image": images(), "label": torch.arange(7) % CLASSES, "row": row}
    z = model.training_indices(3, row)  # type: ignore[operator]
    quantile = model.quantiles(3, row[:, 0], z)  # type: ignore[operator]
    assert quantile.shape == (len(z), 7)
    for k in range(len(z)):
        for b in range(7):  # of an example and an index, whatever the step and whoever comes with them
            one = model.quantiles(3, row[b : b + 1, 0], z[k : k + 1, b % z.shape[1]][:, None])  # type: ignore[operator]
            torch.testing.assert_close(one[0, 0], quantile[k, b])
    count = torch.where(quantile < 0.5, 2.0, 0.0) if bootstrap is Bootstrap.bernoulli else -torch.log(1 - quantile)
    losses = -model(batch["image"], z).log_softmax(2).gather(2, batch["label"].expand(len(z), 7)[..., None])[..., 0]
    torch.testing.assert_close(task.losses(model, batch), (count * losses).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [EpistemicKind.epinet, EpistemicKind.ensemble])
def test_how_much_an_example_counts_has_its_law(kind: EpistemicKind) -> None:
    """Uniform quantiles over indices of one example and over examples, and weights of mean one."""
    model = of(kind)
    z = torch.randn(2000, 1, 6) if kind is EpistemicKind.epinet else torch.eye(4)[:, None]
    quantile = model.quantiles(0, torch.arange(2000), z)
    over_indices = quantile[:, 5] if kind is EpistemicKind.epinet else quantile[2]
    assert stats.kstest(over_indices.numpy(), "uniform").pvalue > 1e-3
    for bootstrap in (Bootstrap.bernoulli, Bootstrap.exponential):
        assert weights(bootstrap, quantile).mean().item() == pytest.approx(1, abs=0.05)
    if kind is EpistemicKind.epinet:
        torch.testing.assert_close(model.quantiles(0, torch.arange(2000), -z), 1 - quantile, rtol=1e-4, atol=1e-5)
    else:
        assert np.abs(np.corrcoef(quantile.numpy()) - np.eye(4)).max() < 0.1, "members draw by themselves"


def digits(uri: str, numbers: np.ndarray) -> None:
    """Of scikit-learn's, some, at 16 pixels."""
    data = load_digits()
    dataset = Dataset.create(uri, header(len(numbers), 32, "digits"))
    for shard in range(dataset.header.num_shards):
        rows = []
        for i in dataset.header.shard_range(shard):
            image = np.kron(np.clip(data.images[numbers[i]] * 15.9, 0, 255), np.ones((4, 4))).astype(np.uint8)
            rows.append({"key": str(i), "image": image[None], "label": int(data.target[numbers[i]])})
        commit_shard(dataset, shard, rows, "test", 0.0)


ARMS: dict[str, dict[str, Any]] = {
    "base": {},
    "epinet": {"start": "base", "trainable": "^epinet", "classifier": {"epistemic": {"kind": "epinet", "index": 8}}},
    "joint": {"classifier": {"epistemic": {"kind": "epinet", "index": 8, "samples": 4}}},
    "in_bf16": {
        "start": "base",
        "trainable": "^epinet",
        "precision": "bf16",
        "classifier": {"epistemic": {"kind": "epinet", "index": 8, "mlp_prior": 0.1}},
    },
}


def train_arms(world: World, folder: str) -> None:
    for name, arm in ARMS.items():
        values: dict[str, Any] = {
            "data": f"{folder}/train",
            "augment": {"shift": 0, "flip": False},
            "trainable": arm.get("trainable", ""),
            "train": {"steps": 100, "batch": 50, "engine": {"ema": 0.9, "optimizer": {"lr": 3e-3}}},
            "run": {"dir": f"{folder}/{name}"},
        }
        values["train"]["engine"]["precision"] = arm.get("precision", "fp32")
        values["classifier"] = {"channels": [8, 16, 32], "dropout": 0.0, **arm.get("classifier", {})}
        if "start" in arm:
            values["start"] = {"run": f"{folder}/{arm['start']}"}
        config = configuration.from_dict(Config, values)
        Store(config.run.dir).write("config.yaml", configuration.to_yaml(config).encode())
        worker(configuration.to_dict(config), world, Recorder("a"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("epinet")
    digits(f"{path}/train", np.random.default_rng(0).permutation(1797)[:200])
    run_ranks(train_arms, 1, str(path))
    return path


def test_an_epinet_on_a_frozen_base_leaves_it_and_the_prior_as_they_were(trained: Path) -> None:
    base = load_ema(Store(f"{trained}/base"))[0]
    for run in ("epinet", "in_bf16"):
        epinet = load_ema(Store(f"{trained}/{run}"))[0]
        assert all(torch.equal(epinet[f"base.{name}"], tensor) for name, tensor in base.items())
    for run in ("epinet", "joint", "in_bf16"):
        # The model of the same seed before training: all but the base is as it was drawn.
        config = configuration.section(ClassifierConfig, Store(f"{trained}/{run}").read("config.yaml"), "classifier")
        before = dict(ClassificationTask(config, header(200, 32), 0).build().named_parameters())
        after = load_ema(Store(f"{trained}/{run}"))[0]
        changed = {n.split(".")[0] for n, t in after.items() if not torch.equal(t, before[n].detach().flatten())}
        assert changed == {"base", "epinet"}


def losses_of(trained: Path, run: str) -> tuple[float, float]:
    """Marginal and dyadic NLL on the digits that were not trained on."""
    data, rest = load_digits(), np.random.default_rng(0).permutation(1797)[201:]
    pixels = np.kron(np.clip(data.images[rest] * 15.9, 0, 255), np.ones((1, 4, 4))).astype(np.uint8)
    x, y = torch.from_numpy(pixels)[:, None], torch.from_numpy(data.target[rest])
    model = classifiers.load(f"{trained}/{run}", "cpu")
    model = model if isinstance(model, EpistemicNetwork) else Ensemble([model])
    with torch.no_grad():
        logits = model(x, model.indices(300))
    log_p = logits.log_softmax(2).gather(2, y.expand(len(logits), -1)[..., None])[..., 0].double().numpy()
    return float(marginal_nll(log_p).mean()), float(exact_polyadic_nll(log_p).mean())


def test_an_epinet_knows_more_about_labels_together(trained: Path) -> None:
    base, *others = (losses_of(trained, run) for run in ARMS)
    assert base[1] == pytest.approx(10 * base[0], rel=1e-6), "one index: labels are independent"
    for found in others:
        assert found[1] < 0.8 * base[1] and found[0] < base[0] + 0.05


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kind": "epinet", "index": 0}, "epistemic.index must be positive"),
        ({"kind": "mc_dropout", "dropout": 1.0}, "epistemic.dropout must lie in"),
        ({"kind": "ensemble", "prior": -1.0}, "must not be negative"),
        ({"kind": "epinet", "mlp_prior": -1.0}, "must not be negative"),
        ({"kind": "epinet", "temperature": 0.0}, "temperature and scale must be positive"),
        ({"kind": "mc_dropout", "bootstrap": "bernoulli"}, "not for mc_dropout"),
    ],
)
def test_what_cannot_be(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps({"data": "x", "classifier": {"epistemic": wrong}, "run": {"dir": "y"}}))
    with pytest.raises(UserError, match=said):
        configuration.load(Config, tmp_path / "c.yaml")


def test_an_ensemble_begins_with_no_run_and_an_epinet_with_one_that_fits(trained: Path, tmp_path: Path) -> None:
    values = {
        "data": "x",
        "start": {"run": "z"},
        "classifier": {"epistemic": {"kind": "ensemble"}},
        "run": {"dir": "y"},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(values))
    with pytest.raises(UserError, match="begin with no run"):
        configuration.load(Config, tmp_path / "c.yaml")
    other = ClassifierConfig(channels=(8, 24, 32), epistemic=EpistemicConfig(EpistemicKind.epinet))
    with pytest.raises(UserError, match="another network"):
        ClassificationTask(other, header(200, 32), 0, start=StartConfig(f"{trained}/base")).build()


def test_an_exported_epinet_predicts_the_mean_over_its_indices(trained: Path, tmp_path: Path) -> None:
    Store(f"{trained}/epinet").put_once("run.json", b'{"job": "train_classifier"}')
    folder = export(f"{trained}/epinet", str(tmp_path / "out"))
    x = torch.randint(0, 256, (5, 1, 32, 32), dtype=torch.uint8)
    program = torch.export.load(Path(folder) / "model.pt2").module()
    expected = classifiers.load(f"{trained}/epinet", "cpu")(x)
    torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)
    described = json.loads((Path(folder) / "config.json").read_text())["architecture"]
    assert described["name"] == "Epinet" and described["epistemic"]["kind"] == "epinet"
    # Its own weights lie apart, and fit on that base alone.
    before, base = classifiers.load(f"{trained}/epinet", "cpu"), classifiers.load(f"{trained}/base", "cpu")
    with safe_open(Path(folder) / "epinet.safetensors", "pt") as file:
        said, names = file.metadata(), set(file.keys())
    state = before.state_dict()
    assert names == {name for name in state if not name.startswith("base.")}
    commit = commits(Store(f"{trained}/base"))[-1]
    assert said["base"] == digest(base.state_dict()) and said["base_run"] == "base"
    assert said["base_commit"] == commit_hash(commit)
    config = configuration.section(ClassifierConfig, Store(f"{trained}/epinet").read("config.yaml"), "classifier")
    start = StartConfig(f"{trained}/base", epinet=str(folder))
    joined = ClassificationTask(config, header(200, 32), 7, start=start).build()
    assert all(torch.equal(tensor, state[name]) for name, tensor in joined.state_dict().items())
    wider = replace(config, epistemic=replace(config.epistemic, hidden=(60,)))
    with pytest.raises(UserError, match=r"is another than `classifier.epistemic` describes \(first difference: epinet"):
        ClassificationTask(wider, header(200, 32), 7, start=start).build()
    warmer = replace(config, epistemic=replace(config.epistemic, temperature=2.0))
    with pytest.raises(UserError, match=r"trained with classifier.epistemic.temperature=1.0, which is 2.0 here"):
        ClassificationTask(warmer, header(200, 32), 7, start=start).build()
    joined.base.head.bias.data[0] += 1e-6  # type: ignore[union-attr,index,operator]
    with pytest.raises(
        UserError, match=r"was trained on another base \(run 'base', weights .* than 'other'.*give start.run"
    ):
        put_epinet(joined, str(folder), "other")
    with pytest.raises(UserError, match=r"has no epinet.safetensors"):
        put_epinet(joined, str(tmp_path), "other")
    with pytest.raises(UserError, match=r"set classifier.epistemic.kind=epinet"):
        put_epinet(base, str(folder), "other")
    assert StartConfig(epinet=str(folder)).problems()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_exported_as_a_program(kind: EpistemicKind) -> None:
    """For batches of any size."""
    model = of(kind)
    program = torch.export.export(model, (images(5),), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for x in (images(5), images(2)):
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


def train_at_stages(world: World, folder: str) -> None:
    for kind in (EpistemicKind.epinet, EpistemicKind.batch_ensemble):
        for stage in (1, 3):
            values = {
                "data": f"{folder}/train",
                "classifier": {"channels": [8, 16], "dropout": 0.0, "epistemic": {"kind": kind.value, "index": 6}},
                # With a large eps, because AdamW makes steps of what is only rounding: biases before norms have no gradient.
                "train": {"steps": 3, "batch": 40, "engine": {"zero_stage": stage, "optimizer": {"eps": 1e-3}}},
                "run": {"dir": f"{folder}/{kind.value}-{stage}"},
            }
            worker(configuration.to_dict(configuration.from_dict(Config, values)), world, Recorder("a"))


def test_two_ranks_that_share_the_weights_learn_what_whole_ones_do(trained: Path) -> None:
    run_ranks(train_at_stages, 2, str(trained))
    for kind in ("epinet", "batch_ensemble"):
        whole, shared = (load_ema(Store(f"{trained}/{kind}-{stage}"))[0] for stage in (1, 3))
        assert whole.keys() == shared.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(shared[name], tensor, rtol=1e-4, atol=1e-5)
