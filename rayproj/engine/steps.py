"""A Step turns per-example losses into one update. The private one is `rayproj.privacy.step`."""

from __future__ import annotations

from typing import Protocol

from rayproj.engine.engine import Engine
from rayproj.engine.task import Batch, Task
from rayproj.errors import UserError


class Step(Protocol):
    micro_batches: int  # backward passes through DeepSpeed in one update
    views: int  # forward and backward passes of an example in one update
    running_totals: tuple[str, ...]  # metrics of which the log wants the last value, not the mean

    def prepare(self, engine: Engine) -> None:
        """Once before the first step: checks that must hold before any update. Collective."""
        ...

    def __call__(self, engine: Engine, task: Task, batch: Batch) -> dict[str, float]:
        """One optimizer update from this rank's slice of the batch. Collective.

        Returns:
            Metrics; the loop logs their mean over the ranks.
        """
        ...


def world_sizes(batch: int, micro_batch: int = 0) -> list[int]:
    """The numbers of ranks that a batch divides over, in whole micro-batches (0: a rank's share is one)."""
    shares = {n: batch // n for n in range(1, batch + 1) if batch % n == 0}
    return [n for n, share in shares.items() if share % (micro_batch or share) == 0]


class PlainStep:
    """The mean loss over the global batch, by micro-batches.

    Args:
        batch: examples in one update, over all ranks.
        micro_batch: examples in one forward and backward of a rank; 0 is the rank's whole slice.

    Raises:
        UserError: the batch does not divide over the ranks and micro-batches.
    """

    views = 1
    running_totals: tuple[str, ...] = ()

    def __init__(self, batch: int, micro_batch: int, world_size: int) -> None:
        if world_size not in world_sizes(batch, micro_batch):
            whole = f" in micro-batches of {micro_batch}" if micro_batch else ""
            raise UserError(
                f"train.batch={batch} does not divide over {world_size} ranks{whole}; set cluster.ranks to one of "
                f"{world_sizes(batch, micro_batch)[:8]}, or change train.batch or train.micro_batch."
            )
        share = batch // world_size
        self.micro_batch = micro_batch or share
        self.micro_batches = share // self.micro_batch

    def prepare(self, engine: Engine) -> None:
        pass

    def __call__(self, engine: Engine, task: Task, batch: Batch) -> dict[str, float]:
        size = len(batch["row"])
        total = 0.0
        for begin in range(0, size, self.micro_batch):
            micro = {name: tensor[begin : begin + self.micro_batch] for name, tensor in batch.items()}
            loss = task.losses(engine.model, micro).mean()
            engine.accumulate(loss, samples=size * engine.world.world_size)
            total += loss.item() * len(micro["row"])
        return {"loss": total / size}
