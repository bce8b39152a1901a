"""One rank's DeepSpeed engine, its EMA and its position. Pure torch and DeepSpeed."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayproj.config import below
from rayproj.engine import ema
from rayproj.engine.compiling import compile_blocks, need_compiler
from rayproj.engine.layout import Piece, Run, cut, join, pieces, runs
from rayproj.engine.timing import StepTimer, charge_collectives
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
        found = [] if self.lr > 0 else [f"optimizer.lr must be positive, not {self.lr}."]
        if not all(0 <= beta < 1 for beta in self.betas):
            found.append("optimizer.betas must lie in [0, 1).")
        return found + below(0, "optimizer", self, "eps", "weight_decay", "warmup_steps", "clip_grad_norm")


@dataclass
class EngineConfig:
    """How one model is held and updated by the ranks of a group."""

    # ZeRO: 0 shards nothing, 1 the optimizer, 2 the gradients too, 3 the weights too. From 2 on each gradient is handled by
    # itself as soon as it is there, which costs time on the host: worth it where the gradients do not fit.
    zero_stage: int = 1
    precision: Precision = Precision.auto
    ema: float = 0.999  # decay of the exponential moving average of the weights, per update
    # Further averages, of these widths (`engine.ema`), such as [0.05, 0.1]; of what several commits hold of them
    # (train.checkpoint.keep_every), one of any width can be put together afterwards.
    ema_widths: list[float] = field(default_factory=list)
    compile: bool = False  # the model's blocks, by torch.compile: a minute at every start
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def problems(self) -> list[str]:
        stages = (0, 1, 2, 3)
        found = (
            [] if self.zero_stage in stages else [f"engine.zero_stage must be one of {stages}, not {self.zero_stage}."]
        )
        if not all(0 < width <= 0.25 for width in self.ema_widths):
            found.append("engine.ema_widths must lie in (0, 0.25].")
        return found if 0 <= self.ema < 1 else [*found, f"engine.ema must lie in [0, 1), not {self.ema}."]


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of update number `step` (from 0) of `steps`."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule is Schedule.constant:
        return config.lr * warm
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


@dataclass(frozen=True)
class Snapshot:
    """A rank's training state on the host, as a checkpoint holds it.

    Attributes:
        sharded: by kind ("master", "exp_avg", "exp_avg_sq" and the averages), the pieces that this rank writes, by key;
            fp32, flat.
        fixed: what the optimizer does not hold, frozen parameters and buffers, by name; fp32, flat. Rank 0's alone.
        generators: states of torch's generators, which draw for layers such as dropout; the rest is keyed.
        position: where the training is, and the shape of the group that it ran on.
    """

    sharded: dict[str, dict[str, Tensor]]
    fixed: dict[str, Tensor]
    generators: dict[str, Tensor]
    position: dict[str, Any]


class Engine:
    """One rank's share of a model in training.

    ZeRO gives each rank a flat fp32 share of the master weights and of the optimizer's moments (`layout`); the EMA here
    is laid out likewise.

    At ZeRO-0 every rank's share is all of it: it is ZeRO-1 over a group of this rank alone, with the gradients averaged
    over the ranks here. What DeepSpeed calls stage 0 is torch's own optimizer in fp32 and another one of its own in bf16;
    neither has a flat share, and each would need a second form of everything below.

    Attributes:
        world: this rank's place.
        group: the ranks whose shares together are the whole; None is all ranks.
        module: the model itself. Below ZeRO-3 it is whole on every rank; at ZeRO-3 its parameters are empty outside of a
            forward or backward.
        plain: the same model without DeepSpeed's hooks, of the same parameters; to be used within `whole_weights` alone.
        deepspeed: the DeepSpeed engine around it.
        optimizer: DeepSpeed's ZeRO optimizer.
        parameters: (name, parameter) of what is trained, in the order of the flat vector.
        sizes: elements of each of them, by name, in the same order.
        averages: fp32 [share] each, of this rank's master weights: "ema", and "ema-<width>" of further ones.
        step: completed updates.
        samples_seen: examples in them, over all ranks.
        timer: where the time goes.
    """

    def __init__(self, model: nn.Module, config: EngineConfig, steps: int, world: World, accumulate: int = 1) -> None:
        """Collective: every rank of the process group calls it.

        Args:
            model: the same weights on every rank.
            steps: planned updates, for the learning-rate schedule.
            accumulate: micro-batches in one update.
        """
        deepspeed = import_deepspeed(world)
        self.config, self.steps, self.world, self.micro_batches = config, steps, world, accumulate
        self._summed: Tensor | None = None  # gradients of an update's micro-batches so far, and how many these were
        self._seen = 0
        self.step = 0
        self.samples_seen = 0
        bf16 = config.precision is Precision.bf16 or (
            config.precision is Precision.auto and world.device.startswith("cuda")
        )
        # Before DeepSpeed hooks into the model; without memory of its own.
        plain = copy.deepcopy(model).to("meta") if config.zero_stage == 3 else None
        if config.compile:
            need_compiler("engine.compile")
            compile_blocks(model)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        numel = {id(p): p.numel() for p in trainable.values()}  # ZeRO-3 is about to empty them
        # What is frozen has no master weights: bf16 would round it for ever.
        frozen = {name: p for name, p in model.named_parameters() if bf16 and not p.requires_grad}
        self.exact: dict[str, Tensor] = {name: to_host(p).flatten() for name, p in frozen.items()}
        opt = config.optimizer
        alone = config.zero_stage == 0
        self.group = dist.new_group([world.rank], use_local_synchronization=True) if alone else None
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model.to(world.device),
            mpu=_alone(self.group) if alone else None,
            optimizer=torch.optim.AdamW(
                list(trainable.values()),
                lr=opt.lr,
                betas=opt.betas,
                eps=opt.eps,
                weight_decay=opt.weight_decay,
                fused=True,  # one pass over the flat share, where the default takes seven
            ),
            config={
                "train_micro_batch_size_per_gpu": 1,  # bookkeeping of DeepSpeed's own loader, which is not used
                "gradient_accumulation_steps": accumulate,
                "zero_optimization": {
                    "stage": max(1, config.zero_stage),
                    "round_robin_gradients": False,
                    "overlap_comm": False,
                    "sub_group_size": 10**15,  # one flat share, as at the other stages
                },
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "bf16": {"enabled": bf16},
                "gradient_clipping": opt.clip_grad_norm,
                "steps_per_print": 10**9,
            },
        )
        deepspeed.utils.groups.mpu = None  # it would be the next engine's in this process too
        charge_collectives(deepspeed.comm.comm.cdb)
        self.timer = StepTimer(world.device)
        self.module: nn.Module = self.deepspeed.module
        names = {id(p): name for name, p in trainable.items()}
        group = self.optimizer.fp16_groups[0] if config.zero_stage == 3 else self.optimizer.bit16_groups[0]
        self.parameters: list[tuple[str, nn.Parameter]] = [(names[id(p)], p) for p in group]
        self.sizes = {names[id(p)]: numel[id(p)] for p in group}
        names_of_averages = ["ema", *(average_of(width) for width in config.ema_widths)]
        self.averages: dict[str, Tensor] = {name: self.master.detach().clone() for name in names_of_averages}
        self.plain = self.module if plain is None else _sharing(plain, self.module)

    @property
    def master(self) -> Tensor:
        """fp32 [share]: this rank's master weights, padding included."""
        if self.config.zero_stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat[0]
        return self.optimizer.single_partition_of_fp32_groups[0]

    @property
    def shares(self) -> int:
        """How many different shares there are: as many as ranks, but one at ZeRO-0."""
        return dist.get_world_size(self.group)

    def pieces(self, number: int | None = None) -> list[Piece]:
        """What a share, by default this rank's, holds."""
        number = dist.get_rank(self.group) if number is None else number
        return pieces(self.sizes, self.config.zero_stage, self.shares, number, len(self.master))

    def written(self) -> list[Piece]:
        """What of its share this rank writes into a checkpoint; at ZeRO-0, where all ranks hold the same, a part."""
        world = self.world
        return pieces(self.sizes, self.config.zero_stage, world.world_size, world.rank, len(self.master))

    def runs(self) -> list[Run]:
        """This rank's share as runs of the flat vector of all trained parameters."""
        return runs(self.sizes, self.pieces())

    def take(self, flat: Tensor) -> Tensor:
        """This rank's share of a flat vector; padding is zero."""
        if self.runs() == [Run(0, len(self.master), 0)] and len(flat) == len(self.master):
            return flat
        share = torch.zeros(len(self.master), dtype=flat.dtype, device=flat.device)
        for run in self.runs():
            share[run.offset : run.offset + run.length] = flat[run.start : run.start + run.length]
        return share

    def whole_weights(self) -> Any:
        """A block in which the parameters are whole on every rank, as they always are below ZeRO-3. Collective."""
        import deepspeed

        parameters = list(self.module.parameters())
        return deepspeed.zero.GatheredParameters(parameters, enabled=self.config.zero_stage == 3)

    def update(self, share_of_gradient: Tensor, samples: int = 0) -> None:
        """One optimizer update from a gradient that the caller made, as private training does. Collective.

        Args:
            share_of_gradient: fp32 [share], what `take` takes of the gradient of the whole batch.
            samples: examples of the whole batch.
        """
        assert share_of_gradient.shape == self.master.shape, share_of_gradient.shape
        self._set_learning_rate()
        with self.timer.phase("optimizer"):
            self.optimizer.averaged_gradients[0] = [share_of_gradient]
            self.optimizer.step()
            self._after_update(samples)

    def gradient_that_reaches_the_optimizer(self, share_of_gradient: Tensor) -> Tensor:
        """What `update` would hand to the wrapped optimizer, without updating: for self-tests. Collective."""
        seen: list[Tensor] = []
        # An instance attribute hides the method for the length of the call.
        self.optimizer._optimizer_step = lambda group: seen.append(self.master.grad.clone())  # type: ignore[union-attr]
        try:
            self.optimizer.averaged_gradients[0] = [share_of_gradient]
            self.optimizer.step()
        finally:
            del self.optimizer._optimizer_step
        # DeepSpeed skips an update that is not finite.
        return seen[0] if seen else torch.full_like(share_of_gradient, torch.nan)

    @property
    def model(self) -> nn.Module:
        """What `accumulate` takes the loss of: below ZeRO-2 the model itself."""
        return self.module if self.config.zero_stage < 2 else self.deepspeed

    def accumulate(self, loss: Tensor, samples: int) -> None:
        """Backward of one micro-batch's mean loss; the last one of an update takes the optimizer step. Collective."""
        if self.config.zero_stage < 2:
            self._accumulate_whole(loss, samples)
            return
        self.deepspeed.backward(loss)
        last = self.deepspeed.is_gradient_accumulation_boundary()
        with self.timer.phase("optimizer"):
            if last:
                self._set_learning_rate()
            self.deepspeed.step()
            if last:
                self._after_update(samples)

    def _accumulate_whole(self, loss: Tensor, samples: int) -> None:
        """Below ZeRO-2 a rank has the whole gradient anyway: it is reduced in one piece, in the dtype of the weights as
        DeepSpeed does; of several micro-batches their sum, in fp32."""
        parameters = [p for _, p in self.parameters]
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        flat = torch.cat([gradient.flatten() for gradient in found])
        del found
        if self.micro_batches > 1:
            flat = flat.float() if self._summed is None else self._summed.add_(flat)
        self._summed, self._seen = flat, self._seen + 1
        if self._seen == self.micro_batches:
            if self.world.world_size > 1:
                with self.timer.phase("communication"):
                    dist.all_reduce(flat)
            share = self.take(flat.div_(self.micro_batches * self.world.world_size)).float()
            self._summed, self._seen = None, 0
            self.update(share, samples)

    def _set_learning_rate(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, self.step, self.steps)

    def _after_update(self, samples: int) -> None:
        self.step += 1
        self.samples_seen += samples
        # A young average forgets its start sooner: decay min(d, (1 + n) / (10 + n)), as in Tensorflow's EMA.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        self.averages["ema"].lerp_(self.master.detach(), 1 - decay)
        for width in self.config.ema_widths:
            self.averages[average_of(width)].lerp_(self.master.detach(), 1 - ema.decay(self.step, width))

    def averaged_weights(self) -> dict[str, Tensor]:
        """The moving average of the whole model, and what is not trained of it: flat fp32 by name. Collective."""
        own = self.averages["ema"]
        shares = [torch.empty_like(own) for _ in range(self.shares)]
        dist.all_gather(shares, own.contiguous(), group=self.group)
        parts: dict[str, Tensor] = {}
        for number, share in enumerate(shares):
            parts |= cut(share, self.pieces(number))
        return join(parts) | self._fixed()

    def _fixed(self) -> dict[str, Tensor]:
        """Frozen parameters and buffers, flat, fp32. Collective at ZeRO-3."""
        with self._whole(list(self.module.parameters())):
            state = {name: self.exact.get(name, t) for name, t in self.module.state_dict().items()}
            return {
                name: t.detach().to(self.world.device, torch.float32, copy=True).flatten()
                for name, t in state.items()
                if name not in self.sizes
            }

    def _whole(self, parameters: list[nn.Parameter], modifier: int | None = None) -> Any:
        """At ZeRO-3, a block in which frozen parameters are whole; else nothing."""
        import deepspeed

        frozen = [p for p in parameters if not p.requires_grad]
        return deepspeed.zero.GatheredParameters(frozen, modifier, enabled=self.config.zero_stage == 3 and bool(frozen))

    def mean_over_ranks(self, values: list[float]) -> list[float]:
        """The mean of each value over the ranks. Collective; one message."""
        with self.timer.phase("communication"):
            tensor = torch.tensor(values, dtype=torch.float64, device=self.world.device)
            dist.all_reduce(tensor)
            return (tensor / self.world.world_size).tolist()

    def snapshot(self) -> Snapshot:
        """Copy this rank's state to the host. Collective at ZeRO-3; what is trained afterwards does not change it."""
        state = self.optimizer.optimizer.state.get(self.master, {})
        zeros = torch.zeros(0)
        flat = {"master": self.master, **self.averages}
        flat |= {kind: state.get(kind, zeros) for kind in ("exp_avg", "exp_avg_sq")}
        written = self.written()
        sharded = {
            kind: {key: to_host(part) for key, part in cut(share, written).items()}
            if len(share)
            else {p.key: torch.zeros(p.length) for p in written}
            for kind, share in flat.items()
        }
        fixed = self._fixed()
        generators = {"torch": torch.get_rng_state()}
        if self.world.device.startswith("cuda"):
            generators["cuda"] = torch.cuda.get_rng_state(self.world.device)
        position = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "optimizer_steps": int(state.get("step", 0)),  # fewer than `step` where DeepSpeed skipped an update
            "world_size": self.world.world_size,
            "zero_stage": self.config.zero_stage,
            "torch": torch.__version__,
        }
        return Snapshot(
            sharded, {n: to_host(t) for n, t in fixed.items()} if self.world.rank == 0 else {}, generators, position
        )

    def load(self, snapshot: Snapshot) -> None:
        """The inverse of `snapshot`. Collective.

        The pieces may be cut in any way, as another world size or ZeRO stage did, so long as they cover this rank's
        share. Without generator states, torch's generator is seeded by the step and the rank.

        Raises:
            UserError: they are of another model, or lack an average that the config asks for.
        """
        position = snapshot.position
        shares = {kind: torch.zeros_like(self.master) for kind in ("master", "exp_avg", "exp_avg_sq", *self.averages)}
        if missing := sorted(set(shares) - set(snapshot.sharded)):
            raise UserError(
                f"The checkpoint has no '{missing[0]}': the run began without it. Set train.engine.ema_widths as it was, or "
                "start again in another run.dir."
            )
        whole = {kind: join(parts) for kind, parts in snapshot.sharded.items()} if not self._fits(snapshot) else None
        for kind, share in shares.items():
            for p in self.pieces():
                part = (
                    snapshot.sharded[kind][p.key]
                    if whole is None
                    else _checked(whole[kind], p.name, self.sizes[p.name])[p.start : p.start + p.length]
                )
                share[p.offset : p.offset + p.length] = part.to(share)
        self.master.data.copy_(shares["master"])
        for name, average in self.averages.items():
            average.copy_(shares[name])
        if position["optimizer_steps"]:
            self.optimizer.optimizer.state[self.master] = {
                "step": torch.tensor(float(position["optimizer_steps"]), device=self.master.device),
                "exp_avg": shares["exp_avg"],
                "exp_avg_sq": shares["exp_avg_sq"],
            }
        self._weights_from_master()
        self._load_fixed(snapshot.fixed)
        generators = snapshot.generators
        torch.set_rng_state(generators["torch"]) if generators else torch.manual_seed(
            position["step"] * self.world.world_size + self.world.rank
        )
        if "cuda" in generators and self.world.device.startswith("cuda"):
            torch.cuda.set_rng_state(generators["cuda"], self.world.device)
        self.step, self.samples_seen = position["step"], position["samples_seen"]

    def _fits(self, snapshot: Snapshot) -> bool:
        """Whether the pieces are cut just as this rank's are."""
        keys = {p.key: p.length for p in self.pieces()}
        return all({k: len(t) for k, t in parts.items()} == keys for parts in snapshot.sharded.values())

    def _weights_from_master(self) -> None:
        """Make the model's weights those of the master weights on all ranks."""
        if self.config.zero_stage != 3:
            self.optimizer.update_lp_params()
            return
        kept = self.optimizer.persistent_parameters  # small ones, that ZeRO-3 holds whole on every rank
        if kept:
            kept[0].partition(kept)
        self.optimizer._reassign_or_swap_out_partitioned_parameters(0)
        if kept:
            kept[0].all_gather(kept)

    @torch.no_grad()
    def _load_fixed(self, fixed: dict[str, Tensor]) -> None:
        if not fixed:
            return
        self.exact = {name: _checked(fixed, name, t.numel()) for name, t in self.exact.items()}
        with self._whole(list(self.module.parameters()), modifier=0):
            for name, tensor in self.module.state_dict().items():
                if name not in self.sizes:
                    tensor.copy_(_checked(fixed, name, tensor.numel()).view_as(tensor).to(tensor))


def average_of(width: float) -> str:
    """The name of the average of a width."""
    return f"ema-{width:g}"


def _alone(group: Any) -> Any:
    """DeepSpeed's way to be told of groups, Megatron's `mpu`: all of the data-parallel ranks are this one."""
    kinds, one = ("data_parallel", "model_parallel"), {"group": group, "world_size": 1, "rank": 0}
    return SimpleNamespace(**{f"get_{kind}_{what}": lambda v=v: v for kind in kinds for what, v in one.items()})


def _sharing(plain: nn.Module, module: nn.Module) -> nn.Module:
    """`plain` with the parameters and buffers of `module`."""
    for name, layer in module.named_modules():
        for held, own in ((layer._parameters, "_parameters"), (layer._buffers, "_buffers")):
            getattr(plain.get_submodule(name), own).update(held)
    return plain


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _checked(flat: dict[str, Tensor], name: str, size: int) -> Tensor:
    if name not in flat or len(flat[name]) != size:
        raise UserError(f"The checkpoint is of another model than the config describes (first difference: {name}).")
    return flat[name]


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
    _import_muon()
    return deepspeed


def _import_muon() -> None:
    """Import DeepSpeed's Muon without compiling it. ZeRO imports it at the first step, to see that the optimizer is another
    one, and `torch.compile` around its functions brings in Inductor: a fifth of the time that a rank takes to start."""
    from deepspeed.runtime import compiler

    compile_, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compile_
