"""Train a classifier on a dataset, real or synthetic; a synthetic one may still be in the making.

python jobs/train_classifier.py configs/train_classifier.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayproj import config as configuration
from rayproj.classifiers.adversary import AdversaryConfig, Several, Training
from rayproj.classifiers.augment import AugmentConfig
from rayproj.classifiers.epinet import EpistemicKind
from rayproj.classifiers.model import StartConfig
from rayproj.classifiers.networks import ClassifierConfig
from rayproj.classifiers.objective import Balance, Objective, ObjectiveConfig
from rayproj.classifiers.task import ClassificationTask
from rayproj.data.cells import Cells, cells_of
from rayproj.data.dataset import Dataset, Header
from rayproj.data.loader import Batches, Streamed
from rayproj.data.order import Mixed, Shuffled, Weighted, order_of
from rayproj.data.reader import Joined, Reader
from rayproj.engine.steps import PlainStep, world_sizes
from rayproj.engine.task import pattern_problems
from rayproj.engine.training import Link, Recipe, TrainConfig, summary, train
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.runtime.command import command
from rayproj.runtime.group import GroupConfig
from rayproj.runtime.run import Run, RunConfig
from rayproj.runtime.supervisor import fit
from rayproj.storage.store import Store
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    data: str = "???"  # a dataset with the fields "image" and "label"
    mix: dict[str, float] = field(
        default_factory=dict
    )  # further ones, such as real images -> share of every batch, or 0
    consumer: str = ""  # read the first epoch as it is written, under this name; "": the dataset is complete
    wait_seconds: float = 600.0  # for the dataset, and for each next shard of it
    start: StartConfig = field(default_factory=StartConfig)  # such as a classifier of synthetic images
    trainable: str = ""  # regular expression: parameters so named are trained, such as ^head; the others stay
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: GroupConfig = field(default_factory=GroupConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def problems(self) -> list[str]:
        sound = all(share >= 0 for share in self.mix.values()) and sum(self.mix.values()) < 1
        found = [] if sound else ["mix: shares are not negative and leave something for data: together less than 1."]
        if self.consumer and self.objective.needs_cells:
            found.append(
                "objective: groups are counted before the training, so the dataset must be complete: consumer=''."
            )
        epistemic = self.classifier.epistemic.kind
        if self.start and epistemic is EpistemicKind.ensemble:
            found.append("start: the members of an ensemble begin differently, so that they begin with no run.")
        if self.adversary.training is not Training.none and epistemic is not EpistemicKind.none:
            found.append("adversary.training does not go with classifier.epistemic.")
        threats, branches = len(self.adversary.threats), len(self.classifier.branches)
        if self.adversary.training is not Training.none and self.classifier.adapters and branches > 2:
            if branches != 1 + threats:
                found.append(
                    f"classifier.branches: after the first there is one for all {threats} of adversary.threats or one for "
                    f"each, not {branches - 1}."
                )
            if self.adversary.several is Several.steepest:
                found.append("adversary.several=steepest is one attack under all threats, of one branch.")
        return found + pattern_problems(self.trainable, "trainable")


def task_of(config: Config, header: Header, cells: Cells | None = None) -> ClassificationTask:
    # Where cells are needed and not counted, as for a plan, the objective is one that needs none.
    known = cells is not None or not config.objective.needs_cells
    objective = Objective(config.objective if known else ObjectiveConfig(), cells)
    common = (config.classifier, header, config.run.seed, config.augment)
    return ClassificationTask(*common, objective, config.start, config.trainable, config.adversary)


def worker(values: dict[str, Any], world: World, link: Link) -> dict[str, Any]:
    config = configuration.from_dict(Config, values)
    config.mix = {uri: share for uri, share in config.mix.items() if share > 0}
    dataset = Dataset.open(config.data, config.wait_seconds, link.stop_requested)
    header = dataset.header
    batch, seed = config.train.batch, config.run.seed
    others = [Dataset.open(uri) for uri in config.mix]
    for given in [*others, *([] if config.consumer else [dataset])]:
        if given.without_label:
            raise UserError(
                f"{given.uri} has {given.without_label} images without a label, of which a classifier cannot learn; leave "
                "them out, as an import does that puts them into the part 'unlabelled'."
            )
    by = ["label", *config.objective.groups]
    cells = cells_of([dataset, *others], by) if config.objective.needs_cells else None
    task = task_of(config, header, cells)
    order: Any = Shuffled(header.num_samples, header.shard_size, batch, seed, bool(config.consumer))
    if cells and config.objective.balance is Balance.oversample:
        own = Cells(cells.numbers[: header.num_samples], cells.names)
        order = Weighted(own.inverse(), header.shard_size, batch, seed)
    reader: Any = Reader(dataset, fields=["image", "label"], wait_seconds=config.wait_seconds, stop=link.stop_requested)
    if config.mix:
        shares = [1 - sum(config.mix.values()), *config.mix.values()]
        order = Mixed([order, *(order_of(other, batch, seed) for other in others)], shares, batch, seed)
        reader = Joined([reader, *(Reader(other, fields=["image", "label"]) for other in others)])
    batches: Any = Batches(reader, order, world.rank, world.world_size)
    batches = Streamed(batches, order, dataset, config.consumer) if config.consumer else batches
    step = PlainStep(config.train.batch, config.train.micro_batch, world.world_size)
    engine = train(Recipe(task, step, batches, config.train), world, Store(config.run.dir), link)
    if config.consumer:
        batches.finish()
    return summary(engine, world)


def main(config: Config) -> dict[str, Any]:
    with Run.open("train_classifier", config) as run:
        worlds = world_sizes(config.train.batch, config.train.micro_batch)
        return run.result or run.finish(fit(run, "rayproj.jobs.train_classifier:worker", config.cluster, worlds))


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
