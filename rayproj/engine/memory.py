"""The memory that a rank needs, computed before anything is started.

What the engine keeps follows from the number of parameters. What a forward and backward need is found by running them on
fake tensors, which have shapes and no contents, and counting what is alive at the fullest moment: nothing has to be known
about the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rayproj.engine.task import Batch, Task

BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in elements
PERSISTENT = 100_000  # elements; ZeRO-3 keeps smaller parameters whole (stage3_param_persistence_threshold)

Parts = dict[str, int]
"""Bytes by what they are for."""


class _WithoutContents(FakeTensorMode):
    """Copies of its tensors, such as a model makes of its layers, are of the same mode."""

    def __deepcopy__(self, memo: Any) -> _WithoutContents:
        return self


class _Answered(TorchFunctionMode):
    """No value is asked for: `trunc_normal_` draws until nothing is outside, and here nothing is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return False if func is torch.Tensor.__bool__ else func(*args, **(kwargs or {}))


class Model:
    """A task's model without its contents: the sizes of its parameters, and what it needs to run.

    Args:
        bf16: whether the weights are held in bf16.
    """

    def __init__(self, task: Task, bf16: bool = False) -> None:
        self.task, self.fake, self.bf16 = task, _WithoutContents(), bf16
        # A task that starts from trained weights has a `network` without them: they may not be there yet.
        build: Callable[[], nn.Module] = getattr(task, "network", task.build)
        with self.fake, torch.random.fork_rng(), _Answered():
            self.module = build()
            if bf16:
                self.module.bfloat16()
        self.trained = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        self.sizes = {name: p.numel() for name, p in self.trained}
        state = self.module.state_dict()
        self.fixed = sum(t.numel() for name, t in state.items() if name not in self.sizes)

    @property
    def parameters(self) -> int:
        return sum(self.sizes.values())

    def batch(self, examples: int, fields: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> Batch:
        """Examples of the given fields (shape and dtype by name), without contents."""
        with self.fake:
            columns = {name: torch.zeros((examples, *shape), dtype=dtype) for name, (shape, dtype) in fields.items()}
            return {"row": torch.zeros((examples, 3), dtype=torch.int64), **columns}

    def peak(self, work: Callable[[], Any]) -> int:
        """Bytes alive at the fullest moment of `work`, beyond the model and what was alive before."""
        with self.fake, _Alive(self.module.state_dict(keep_vars=True).values()) as alive:
            work()
        return alive.peak

    def forward_and_backward(self, batch: Batch) -> int:
        """Bytes at the fullest moment of one micro-batch, without the gradients, which are counted apart."""
        hooks = [p.register_post_accumulate_grad_hook(_forget) for _, p in self.trained]
        try:
            return self.peak(lambda: self.task.losses(self.module, batch).mean().backward())
        finally:
            for hook in hooks:
                hook.remove()


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that live, from when an operation makes them until they are collected."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Layout:
    """How an engine holds a model; see `Engine`."""

    zero_stage: int
    world_size: int
    bf16: bool = False
    on_gpu: bool = False
    micro_batches: int = 1
    averages: int = 1

    @property
    def weight(self) -> int:
        """Bytes of one weight."""
        return 2 if self.bf16 else 4

    def share(self, model: Model) -> int:
        """Bytes of a rank's share of the parameters in fp32."""
        return 4 * -(-model.parameters // (self.world_size if self.zero_stage else 1))

    def bucket(self, model: Model) -> int:
        """Bytes of DeepSpeed's bucket for gradients: all of it on a GPU, but on a host only what is ever written to."""
        return self.weight * (BUCKET if self.on_gpu else min(BUCKET, model.parameters))


def kept(model: Model, layout: Layout) -> Parts:
    """What a rank holds all the time."""
    share, fixed = layout.share(model), layout.weight * model.fixed
    weights = layout.weight * model.parameters
    sharded = {"master weights": share, "moments of AdamW": 2 * share, "moving averages": layout.averages * share}
    if layout.zero_stage < 3:
        return {"weights": weights + fixed, **sharded}
    small = layout.weight * sum(size for size in model.sizes.values() if size < PERSISTENT)
    gradients = layout.bucket(model) + share
    return {"weights": weights // layout.world_size + small + fixed, **sharded, "gradients": gradients}


def update(model: Model, layout: Layout) -> int:
    """Bytes that come and go with an ordinary update, at the fullest moment of reducing gradients and applying them."""
    whole, share, alone = layout.weight * model.parameters, layout.share(model), layout.world_size == 1
    if layout.zero_stage == 3:
        # The weights as gathered, the gradients in one piece, the copy that is reduced and, on a host, gloo's own.
        reducing = 2 * whole + (0 if alone else whole if layout.on_gpu else 2 * whole)
    elif layout.zero_stage == 2:
        summed = layout.bucket(model) + max(share, 0 if alone else whole)
        reducing = summed + (share if layout.micro_batches > 1 else 0)
    else:
        # The gradients, one piece of them, the sum of micro-batches; later the share and, on a host, gloo's own copy.
        several = layout.micro_batches > 1
        waiting = 4 * model.parameters if several else 0
        reducing = waiting + max(2 * whole, (0 if several else whole) + max(share, 0 if alone else whole))
    return max(reducing, 3 * share)  # AdamW: the gradient and two vectors of intermediate results


def snapshot(model: Model, layout: Layout) -> int:
    """Bytes of the copy that a checkpoint takes on the host, and beside bf16 weights of that of what is frozen."""
    shared = 4 * (3 + layout.averages) * -(-model.parameters // layout.world_size)
    return shared + 4 * model.fixed * (2 if layout.bf16 else 1)


def checkpoint_bytes(model: Model, averages: int = 1) -> int:
    """Bytes of a commit, all ranks together: master weights, two moments and the averages, in fp32."""
    return 4 * ((3 + averages) * model.parameters + model.fixed)
