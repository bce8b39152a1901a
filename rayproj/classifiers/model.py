"""Trained classifiers by their run dirs, and mixtures of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from rayproj import config as configuration
from rayproj.classifiers.adapters import Adapted
from rayproj.classifiers.adversary import ERRORS, LATEST
from rayproj.classifiers.epinet import EpistemicNetwork
from rayproj.classifiers.networks import ClassifierConfig, build
from rayproj.classifiers.objective import GROUP_WEIGHTS
from rayproj.classifiers.soups import soup
from rayproj.data.dataset import Dataset, Header
from rayproj.engine.checkpoint import load_ema
from rayproj.engine.engine import load_flat
from rayproj.errors import UserError
from rayproj.storage.store import Store

KEPT = (GROUP_WEIGHTS, ERRORS, LATEST)


def weights_of(run_dir: str) -> dict[str, torch.Tensor]:
    """The averaged weights of a classifier run's newest commit, flat fp32 by name, without what the training kept
    there.

    Raises:
        UserError: the run has no commit.
    """
    store = Store(run_dir)
    if not store.exists("config.yaml"):
        raise UserError(f"There is no run at '{run_dir}'; give the run dir of jobs/train_classifier.py.")
    return {name: tensor for name, tensor in load_ema(store)[0].items() if name not in KEPT}


def network_for(config: ClassifierConfig, images: Header) -> nn.Module:
    """An untrained network for the images of a dataset."""
    channels, side, _ = images.fields["image"].shape
    return build(config, channels, side, len(images.classes))


def of_run(run_dir: str, images: Header) -> nn.Module:
    """The network of a run, for such images, with its averaged weights.

    Raises:
        UserError: the run has no commit, or is for other images.
    """
    weights = weights_of(run_dir)
    model = network_for(
        configuration.section(ClassifierConfig, Store(run_dir).read("config.yaml"), "classifier"), images
    )
    load_flat(model, weights)
    return model


def load(run_dir: str, device: str) -> nn.Module:
    """The averaged weights of a classifier run, in eval mode. An `EpistemicNetwork` where the run's config asks for one.

    Raises:
        UserError: the run has no commit, or its data are gone.
    """
    weights_of(run_dir)  # says what is amiss before the data do
    header = Dataset.open(configuration.value(Store(run_dir).read("config.yaml"), "data")).header
    return of_run(run_dir, header).to(torch.device(device)).eval().requires_grad_(False)


@dataclass
class StartConfig:
    """What a classifier starts from in place of random weights; with train.steps=0 it is that."""

    run: str = ""  # run dir of a classifier of the same size
    soup: dict[str, float] = field(default_factory=dict)  # run dirs -> their weights in a mixture, which sum to 1
    learned: str = ""  # a soup that jobs/soup.py learned: <soup.out>/<set>:<how>
    # Of a start with adapters: the weights of its branches (of the clean and the adversarial one), which become one network.
    mix: list[float] = field(default_factory=list)

    def problems(self) -> list[str]:
        several = sum(map(bool, (self.run, self.soup, self.learned))) > 1
        found = ["start: give one of run, soup and learned."] if several else []
        if self.soup and abs(sum(self.soup.values()) - 1) > 1e-6:
            found.append(f"start.soup: the weights sum to {sum(self.soup.values()):g}, and should to 1.")
        return found if self or not self.mix else [*found, "start.mix needs start.run or start.soup."]

    def __bool__(self) -> bool:
        return bool(self.run or self.soup or self.learned)

    def network(self, config: ClassifierConfig, images: Header) -> nn.Module:
        """A network of this config with these weights; with adapters, if the start had none, its branches are equal;
        of an epistemic network, if the start was none, they are its base's.

        Raises:
            UserError: the start is not there, or is another kind of network.
        """
        wanted = network_for(config, images)  # first, so that what it draws is what it would draw without a start
        members = list(self.soup) or [self.run or self.learned]
        if self.learned:
            from rayproj.robustness.mixing import learned_soup  # which reads classifiers by this module

            found = learned_soup(self.learned, images)
        else:
            found = of_run(members[0], images)
        if self.soup:
            found.load_state_dict(soup([of_run(run, images).state_dict() for run in members], list(self.soup.values())))
        if self.mix:
            if not isinstance(found, Adapted):
                raise UserError(f"start.mix: '{members[0]}' has no adapters to mix.")
            if len(self.mix) != len(found.names):
                raise UserError(f"start.mix has {len(self.mix)} weights; the branches are {', '.join(found.names)}.")
            found = found.merged(torch.tensor(self.mix))
        if config.adapters and not isinstance(found, Adapted):
            found = Adapted(found, config.adapters, config.branches)
        given = found.state_dict()
        inside = (
            isinstance(wanted, EpistemicNetwork) and hasattr(wanted, "base") and not isinstance(found, EpistemicNetwork)
        )
        place: nn.Module = wanted.base if inside else wanted  # type: ignore[assignment]
        state = place.state_dict()
        wrong = sorted(set(state) ^ set(given)) or [n for n in state if state[n].shape != given[n].shape]
        if wrong:
            raise UserError(
                f"'{members[0]}' is another network than `classifier` describes (first difference: {wrong[0]})."
            )
        place.load_state_dict(given)
        return wanted
