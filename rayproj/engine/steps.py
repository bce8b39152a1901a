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
        if batch % world_size:
            divisors = [n for n in range(1, batch + 1) if batch % n == 0]
            raise UserError(
                f"train.batch={batch} does not divide over {world_size} ranks; "
                f"set cluster.ranks to one of {divisors[:8]} or change the batch."
            )
        share = batch // world_size
        self.micro_batch = micro_batch or share
        if share % self.micro_batch:
            raise UserError(
                f"train.micro_batch={micro_batch} does not divide a rank's {share} examples; use a divisor."
            )
        self.micro_batches = share // self.micro_batch

    def prepare(self, engine: Engine) -> None:
        pass

    def __call__(self, engine: Engine, task: Task, batch: Batch) -> dict[str, float]:
        size = len(batch["row"])
        total = 0.0
        for begin in range(0, size, self.micro_batch):
            micro = {name: tensor[begin : begin + self.micro_batch] for name, tensor in batch.items()}
            loss = task.losses(engine.deepspeed, micro).mean()
            engine.accumulate(loss, samples=size * engine.world.world_size)
            total += loss.item() * len(micro["row"])
        return {"loss": total / size}
