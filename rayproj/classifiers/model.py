"""Trained classifiers by their run dirs, and mixtures of them."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rayproj import config as configuration
from rayproj.classifiers.adapters import Adapted
from rayproj.classifiers.adversary import ERRORS, LATEST
from rayproj.classifiers.epinet import Epinet, EpistemicNetwork
from rayproj.classifiers.networks import ClassifierConfig, build
from rayproj.classifiers.objective import GROUP_WEIGHTS
from rayproj.classifiers.soups import soup
from rayproj.data.dataset import Dataset, Header
from rayproj.engine.checkpoint import load_ema
from rayproj.engine.engine import load_flat
from rayproj.errors import UserError
from rayproj.storage.store import Store

KEPT = (GROUP_WEIGHTS, ERRORS, LATEST)
EPINET = "epinet.safetensors"  # of an export: an epinet without its base, with the digest of that


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and bytes of tensors, by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


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
    # Folder of `rayproj export` of an epinet, to be put on the run: on the very base that it learned on.
    epinet: str = ""

    def problems(self) -> list[str]:
        several = sum(map(bool, (self.run, self.soup, self.learned))) > 1
        found = ["start: give one of run, soup and learned."] if several else []
        if self.soup and abs(sum(self.soup.values()) - 1) > 1e-6:
            found.append(f"start.soup: the weights sum to {sum(self.soup.values()):g}, and should to 1.")
        if self.epinet and not self:
            found.append("start.epinet needs the base that it was trained on: give its run in start.run.")
        return found if self or not self.mix else [*found, "start.mix needs start.run, start.soup or start.learned."]

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
        if self.epinet:
            put_epinet(wanted, self.epinet, members[0])
        return wanted


def began_with(run_dir: str) -> list[str]:
    """The run dirs of the classifiers that a run started from."""
    start = configuration.value(Store(run_dir).read("config.yaml"), "start")
    learned = start.get("learned", "").rpartition(":")[0]
    mixed = Dataset.open(learned).header.provenance["soup"]["members"].values() if learned else ()
    return [run.rstrip("/") for run in (start["run"], *start["soup"], *mixed) if run]


def with_starts(run_dir: str) -> set[str]:
    """A run, what it began with, what that began with, and so on."""
    return {run_dir.rstrip("/")}.union(*(with_starts(run) for run in began_with(run_dir)))


def put_epinet(network: nn.Module, folder: str, base: str) -> None:
    """Give an epinet the weights of another one, which was trained on the same base.

    Args:
        folder: of `rayproj export`, with an epinet.safetensors.
        base: where the network's base is from, as messages call it.

    Raises:
        UserError: there is none, or it is of another base or of another size.
    """
    from safetensors.torch import load as tensors_of

    store = Store(folder)
    if not isinstance(network, Epinet):
        raise UserError("start.epinet is for an epinet; set classifier.epistemic.kind=epinet.")
    if not store.exists(EPINET):
        raise UserError(
            f"start.epinet: '{folder}' has no {EPINET}; give the folder of 'rayproj export' of an epinet's run."
        )
    data = store.read(EPINET)
    said = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
    if said["base"] != (own := digest(network.base.state_dict())):
        raise UserError(
            f"The epinet of '{folder}' was trained on another base (run '{said['base_run']}', weights {said['base'][:12]}) "
            f"than '{base}' (weights {own[:12]}); give start.run the run that it was trained on."
        )
    own_options, options = network.options(), json.loads(said["epistemic"])
    if changed := [name for name in options if options[name] != own_options[name]]:
        name = changed[0]
        raise UserError(
            f"The epinet of '{folder}' was trained with classifier.epistemic.{name}={options[name]}, which is "
            f"{own_options[name]} here; give it that."
        )
    given, apart = tensors_of(data), network.apart()
    if wrong := sorted(set(apart) ^ set(given)) or [n for n in apart if apart[n].shape != given[n].shape]:
        raise UserError(
            f"The epinet of '{folder}' is another than `classifier.epistemic` describes (first difference: {wrong[0]})."
        )
    network.load_state_dict(given, strict=False)
