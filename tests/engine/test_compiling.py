"""Compiled blocks and pixels that lie side by side change how fast a model is, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rayproj.data.dataset import Field, Header
from rayproj.diffusion.conditions import Conditions
from rayproj.diffusion.denoiser import Denoiser, DenoiserConfig, Network
from rayproj.diffusion.task import DiffusionConfig, DiffusionTask
from rayproj.engine.compiling import compile_blocks, need_compiler
from rayproj.engine.engine import EngineConfig, OptimizerConfig
from rayproj.engine.flops import flops_per_sample
from rayproj.engine.steps import PlainStep
from rayproj.engine.training import Engine
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.privacy.step import refuse_engine
from tests.support.ranks import run_ranks
from tests.support.regression import weights_of

UNET = DenoiserConfig(channels=(16, 32), head_dim=16, norm_groups=8)
DIT = DenoiserConfig(Network.dit, layers=2, heads=2, head_dim=8)
LATENTS = Header("x", {"moments": Field("npy", (8, 4, 4)), "label": Field("int")}, 10, 5, tuple("abc"))


def compiled(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if module._compiled_call_impl is not None}


def test_blocks_are_what_a_model_repeats() -> None:
    dit, unet = (Denoiser(config, (4, 4, 4), Conditions({"label": 3})) for config in (DIT, UNET))
    for model in (dit, unet):
        compile_blocks(model)
    assert compiled(dit) == {"net.transformer_blocks.0", "net.transformer_blocks.1"}
    outer = {f"net.{way}_blocks.{k}" for way in ("down", "up") for k in (0, 1)}
    assert outer <= compiled(unet) and not any(name.count("blocks") > 1 for name in compiled(unet))


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"leave engine\.compile off"):
        refuse_engine(EngineConfig(compile=True, optimizer=OptimizerConfig(clip_grad_norm=0)))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"engine\.compile=true needs a C\+\+ compiler; install g\+\+"):
        need_compiler("engine.compile")


def test_pixels_side_by_side_give_the_same_output() -> None:
    from dataclasses import replace

    conditions, seen = Conditions({"label": 3}), list[bool]()
    plain, other = (Denoiser(c, (4, 8, 8), conditions) for c in (UNET, replace(UNET, channels_last=True)))
    other.load_state_dict(plain.state_dict())
    other.net.conv_in.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    x, t, condition = torch.randn(5, 4, 8, 8), torch.rand(5), {"label": torch.arange(5) % 3}
    torch.testing.assert_close(other(x, t, condition), plain(x, t, condition), rtol=1e-4, atol=1e-5)
    assert seen == [True]


def learn(world: World, stage: int, compile: bool) -> dict[str, Any]:
    task = DiffusionTask(DiffusionConfig("", denoiser=DIT), LATENTS, seed=0)
    config = EngineConfig(zero_stage=stage, compile=compile, optimizer=OptimizerConfig(lr=1e-3))
    engine, step, losses = Engine(task.build(), config, 10, world), PlainStep(8, 0, world.world_size), []
    share = 8 // world.world_size
    generator = torch.Generator().manual_seed(0)
    moments, mine = torch.randn(8, 8, 4, 4, generator=generator), slice(world.rank * share, (world.rank + 1) * share)
    work = 0.0
    for number in range(4):
        row = torch.stack([torch.arange(8), torch.full((8,), number), torch.zeros(8).long()], 1)
        batch = {"row": row[mine], "moments": moments[mine], "label": torch.arange(8)[mine] % 3}
        work = work or flops_per_sample(engine, task, batch)
        losses.append(step(engine, task, batch)["loss"])
    return {"losses": losses, "work": work, "weights": weights_of(engine), "compiled": len(compiled(engine.module))}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("stage", "ranks"), [(2, 1), (3, 2)])
def test_a_compiled_training_learns_the_same(stage: int, ranks: int, tmp_path: Path) -> None:
    eager, fast = (run_ranks(learn, ranks, stage, way)[0] for way in (False, True))
    assert (eager["compiled"], fast["compiled"]) == (0, 2)
    assert fast["work"] == eager["work"] > 0, "what a compiled block does is counted too"
    assert fast["losses"] == pytest.approx(eager["losses"], rel=1e-4)
    for name, weight in eager["weights"].items():
        assert (fast["weights"][name] - weight).abs().max() < 2e-4
