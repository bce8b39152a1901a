"""One rank's DeepSpeed engine, its EMA and its position. Pure torch and DeepSpeed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rayproj.engine.world import World
from rayproj.errors import UserError


class Precision(Enum):
    auto = "auto"  # bf16 where the device is a GPU, else fp32
    fp32 = "fp32"
    bf16 = "bf16"


class Schedule(Enum):
    constant = "constant"
    cosine = "cosine"  # to zero at the last step


@dataclass
class OptimizerConfig:
    """AdamW and the learning rate over time."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0  # linear from zero
    schedule: Schedule = Schedule.constant
    clip_grad_norm: float = 1.0  # of the averaged gradient; 0 is off. Private training clips per example instead.

    def problems(self) -> list[str]:
        return [] if self.lr > 0 else [f"optimizer.lr must be positive, not {self.lr}."]


@dataclass
class EngineConfig:
    """How one model is held and updated by the ranks of a group."""

    zero_stage: int = 2  # DeepSpeed ZeRO: 1 shards the optimizer, 2 the gradients too
    precision: Precision = Precision.auto
    ema: float = 0.999  # decay of the exponential moving average of the weights, per update
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def problems(self) -> list[str]:
        found = [] if self.zero_stage in (1, 2) else [f"engine.zero_stage must be 1 or 2, not {self.zero_stage}."]
        return found if 0 <= self.ema < 1 else [*found, f"engine.ema must lie in [0, 1), not {self.ema}."]


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of update number `step` (from 0) of `steps`."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule is Schedule.constant:
        return config.lr * warm
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


@dataclass(frozen=True)
class Piece:
    """A run of one parameter's elements that this rank's partition of the flat vector holds."""

    name: str
    start: int  # first element, in the flattened parameter
    length: int
    offset: int  # where it begins in the partition


class Engine:
    """One rank's share of a model in training.

    The trainable parameters form one flat vector, padded to a multiple of the world size; ZeRO gives each rank an equal
    interval of it (`partition`) with fp32 master weights, optimizer moments and, here, the EMA.

    Attributes:
        world: this rank's place.
        module: the model itself (ZeRO-1 and 2 keep it whole on every rank).
        deepspeed: the DeepSpeed engine around it.
        optimizer: DeepSpeed's ZeRO optimizer.
        parameters: (name, parameter) in the order of the flat vector.
        partition: this rank's interval of the padded flat vector, in elements.
        ema: fp32 [len(partition)], the moving average of this rank's master weights.
        step: completed updates.
        samples_seen: examples in them, over all ranks.
    """

    def __init__(self, model: nn.Module, config: EngineConfig, steps: int, world: World, accumulate: int = 1) -> None:
        """Collective: every rank of the process group calls it.

        Args:
            model: the same weights on every rank.
            steps: planned updates, for the learning-rate schedule.
            accumulate: micro-batches in one update.
        """
        deepspeed = import_deepspeed(world)
        self.config, self.steps, self.world = config, steps, world
        self.step = 0
        self.samples_seen = 0
        bf16 = config.precision is Precision.bf16 or (
            config.precision is Precision.auto and world.device.startswith("cuda")
        )
        trainable = [p for p in model.parameters() if p.requires_grad]
        opt = config.optimizer
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model.to(world.device),
            optimizer=torch.optim.AdamW(
                trainable, lr=opt.lr, betas=opt.betas, eps=opt.eps, weight_decay=opt.weight_decay
            ),
            config={
                "train_micro_batch_size_per_gpu": 1,  # bookkeeping of DeepSpeed's own loader, which is not used
                "gradient_accumulation_steps": accumulate,
                "zero_optimization": {
                    "stage": config.zero_stage,
                    "round_robin_gradients": False,
                    "overlap_comm": False,
                },
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "bf16": {"enabled": bf16},
                "gradient_clipping": opt.clip_grad_norm,
                "steps_per_print": 10**9,
            },
        )
        self.module: nn.Module = self.deepspeed.module
        names = {id(p): name for name, p in self.module.named_parameters()}
        self.parameters: list[tuple[str, nn.Parameter]] = [(names[id(p)], p) for p in self.optimizer.bit16_groups[0]]
        size = int(self.optimizer.partition_size[0])
        self.partition = range(world.rank * size, (world.rank + 1) * size)
        self.ema: Tensor = self.master.detach().clone()

    @property
    def master(self) -> Tensor:
        """fp32 [len(partition)]: this rank's master weights, padding included."""
        return self.optimizer.single_partition_of_fp32_groups[0]

    @property
    def pieces(self) -> list[Piece]:
        """What this rank's partition holds, in order; padding is left out."""
        found, begin = [], 0
        for name, parameter in self.parameters:
            end = begin + parameter.numel()
            first, last = max(begin, self.partition.start), min(end, self.partition.stop)
            if first < last:
                found.append(Piece(name, first - begin, last - first, first - self.partition.start))
            begin = end
        return found

    def update(self, partition_gradient: Tensor, samples: int = 0) -> None:
        """One optimizer update from a gradient that the caller made, as private training does.

        Collective.

        Args:
            partition_gradient: fp32 [len(partition)], this rank's interval of the gradient of the whole batch.
            samples: examples of the whole batch.
        """
        assert partition_gradient.shape == (len(self.partition),), partition_gradient.shape
        self._set_learning_rate()
        self.optimizer.averaged_gradients[0] = [partition_gradient]
        self.optimizer.step()
        self._after_update(samples)

    def gradient_that_reaches_the_optimizer(self, partition_gradient: Tensor) -> Tensor:
        """What `update` would hand to the wrapped optimizer, without updating: for self-tests. Collective."""
        seen: list[Tensor] = []
        # An instance attribute hides the method for the length of the call.
        self.optimizer._optimizer_step = lambda group: seen.append(self.master.grad.clone())  # type: ignore[union-attr]
        try:
            self.optimizer.averaged_gradients[0] = [partition_gradient]
            self.optimizer.step()
        finally:
            del self.optimizer._optimizer_step
        # DeepSpeed skips an update that is not finite.
        return seen[0] if seen else torch.full_like(partition_gradient, torch.nan)

    def accumulate(self, loss: Tensor, samples: int) -> None:
        """Backward of one micro-batch's mean loss; the last one of an update takes the optimizer step. Collective."""
        self.deepspeed.backward(loss)
        last = self.deepspeed.is_gradient_accumulation_boundary()
        if last:
            self._set_learning_rate()
        self.deepspeed.step()
        if last:
            self._after_update(samples)

    def _set_learning_rate(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, self.step, self.steps)

    def _after_update(self, samples: int) -> None:
        self.step += 1
        self.samples_seen += samples
        # A young average forgets its start sooner: decay min(d, (1 + n) / (10 + n)), as in Tensorflow's EMA.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        self.ema.lerp_(self.master.detach(), 1 - decay)

    @contextmanager
    def ema_weights(self) -> Iterator[nn.Module]:
        """The module with the averaged weights, in eval mode, for the length of a block. Collective."""
        parts = [torch.empty_like(self.ema) for _ in range(self.world.world_size)]
        dist.all_gather(parts, self.ema.contiguous())
        flat = torch.cat(parts)
        saved = [p.detach().clone() for _, p in self.parameters]
        begin = 0
        for _, parameter in self.parameters:
            parameter.data.copy_(flat[begin : begin + parameter.numel()].view_as(parameter))
            begin += parameter.numel()
        self.module.eval()
        try:
            yield self.module
        finally:
            for (_, parameter), kept in zip(self.parameters, saved, strict=True):
                parameter.data.copy_(kept)
            self.module.train()

    def mean_over_ranks(self, values: list[float]) -> list[float]:
        """The mean of each value over the ranks. Collective; one message."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.world.device)
        dist.all_reduce(tensor)
        return (tensor / self.world.world_size).tolist()

    def write_state(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint as files below `folder`. Collective.

        `ds/` holds DeepSpeed's shards; `ema/` this rank's pieces of the averaged weights under their parameters' names,
        so that any world size can read them; `rank-*` the generator states; `state.json` (rank 0) the position.
        """
        rank = self.world.rank
        self.deepspeed.save_checkpoint(
            str(folder), tag="ds", client_state={"universal_checkpoint_info": {}}, save_latest=False
        )
        for script in folder.glob("*.py"):  # DeepSpeed leaves copies of its conversion scripts
            script.unlink()
        (folder / "ema").mkdir(exist_ok=True)
        parts = {f"{p.name}@{p.start}": self.ema[p.offset : p.offset + p.length].contiguous() for p in self.pieces}
        if rank == 0:  # what the optimizer does not hold: frozen parameters and buffers
            held = {name for name, _ in self.parameters}
            fixed = {name: t for name, t in self.module.state_dict().items() if name not in held}
            parts |= {f"{name}@0": t.detach().float().flatten().contiguous() for name, t in fixed.items()}
        save_file(parts, str(folder / "ema" / f"part-{rank:05d}.safetensors"))
        generators = {"torch": torch.get_rng_state()}
        if self.world.device.startswith("cuda"):
            generators["cuda"] = torch.cuda.get_rng_state(self.world.device)
        save_file(generators, str(folder / f"rank-{rank:05d}.safetensors"))
        if rank == 0:
            (folder / "state.json").write_text(json.dumps(self._state(), indent=1))

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "world_size": self.world.world_size,
            "zero_stage": self.config.zero_stage,
            "torch": torch.__version__,
        }

    def read_state(self, folder: Path) -> None:
        """The inverse of `write_state`, from a folder that has every rank's files, already verified. Collective.

        Raises:
            UserError: another world size or ZeRO stage wrote it.
        """
        state = json.loads((folder / "state.json").read_text())
        here = self._state()
        for key, flag in (("world_size", "cluster.ranks"), ("zero_stage", "train.engine.zero_stage")):
            if state[key] != here[key]:
                raise UserError(
                    f"The checkpoint was written with {flag}={state[key]} but this run has {here[key]}; "
                    f"resume with {flag}={state[key]}."
                )
        loaded, _ = self.deepspeed.load_checkpoint(str(folder), tag="ds")
        assert loaded is not None, f"DeepSpeed found nothing below {folder}"
        rank = self.world.rank
        parts = load_file(str(folder / "ema" / f"part-{rank:05d}.safetensors"))
        for p in self.pieces:
            self.ema[p.offset : p.offset + p.length] = parts[f"{p.name}@{p.start}"].to(self.ema)
        generators = load_file(str(folder / f"rank-{rank:05d}.safetensors"))
        torch.set_rng_state(generators["torch"])
        if "cuda" in generators and self.world.device.startswith("cuda"):
            torch.cuda.set_rng_state(generators["cuda"], self.world.device)
        self.step, self.samples_seen = state["step"], state["samples_seen"]


def merge_ema(files: list[Path]) -> dict[str, Tensor]:
    """Put the pieces of all ranks' `ema/part-*.safetensors` together: flat fp32 tensors by parameter name."""
    pieces: dict[str, dict[int, Tensor]] = {}
    for file in files:
        for key, tensor in load_file(str(file)).items():
            name, _, start = key.rpartition("@")
            pieces.setdefault(name, {})[int(start)] = tensor
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in pieces.items()}


def load_flat(module: nn.Module, flat: dict[str, Tensor]) -> None:
    """Copy flat tensors by name into a module's parameters and buffers.

    Raises:
        UserError: the names or sizes do not fit, that is, the config describes another model.
    """
    state = module.state_dict()
    wrong = sorted(set(state) ^ set(flat)) or [n for n, t in state.items() if t.numel() != flat[n].numel()]
    if wrong:
        raise UserError(f"The checkpoint is of another model than the config describes (first difference: {wrong[0]}).")
    module.load_state_dict({name: flat[name].view_as(t).to(t.dtype) for name, t in state.items()})


def import_deepspeed(world: World) -> Any:
    """DeepSpeed, told through its environment what no launcher told it."""
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    on_gpu = world.device.startswith("cuda")
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if not on_gpu:
        # On CPU it would compile a shared-memory all-reduce at first use: a minute, and a compiler. Gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
