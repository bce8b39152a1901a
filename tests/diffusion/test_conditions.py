"""Classes, properties and texts: how they are dropped, embedded and mixed, for every network."""

from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor

from rayproj.data.dataset import Field, Header
from rayproj.diffusion.conditions import ConditionConfig, Conditions, Embedding, learned, noisy, without
from rayproj.diffusion.denoiser import Denoiser, DenoiserConfig, Network
from rayproj.diffusion.sampling import SamplerConfig, integrate
from rayproj.diffusion.task import DiffusionConfig, DiffusionTask
from rayproj.engine.task import Batch
from rayproj.errors import UserError
from rayproj.privacy.clipping import clipped_sum
from rayproj.privacy.plan import ClippingPath

TOKENS, DEPTH = 5, 12
FIELDS = {
    "moments": Field("npy", (8, 4, 4)),
    "label": Field("int"),
    "style": Field("int", values=("a", "b")),
    "note": Field("str"),
    "text_caption": Field("npy", (TOKENS, DEPTH)),
    "text_other": Field("npy", (TOKENS, DEPTH)),
}
HEADER = Header("x", FIELDS, 10, 5, ("p", "q", "r"))
EVERYTHING = {
    "label": ConditionConfig(0.2),
    "style": ConditionConfig(0.4),
    "text": ConditionConfig(0.1, {"caption": 3.0, "other": 1.0}),
}
SMALL: dict[str, DenoiserConfig] = {
    "unet": DenoiserConfig(channels=(16, 32), head_dim=16, norm_groups=8),
    "mmdit": DenoiserConfig(Network.mmdit, head_dim=16, layers=2, heads=2),
    "dit": DenoiserConfig(Network.dit, head_dim=16, layers=2, heads=2),
}


def rows(size: int) -> Tensor:
    return torch.stack([torch.arange(size), torch.full((size,), 2), torch.zeros(size, dtype=torch.long)], 1)


def batch_of(size: int) -> Batch:
    torch.manual_seed(1)
    texts = torch.randn(2, size, TOKENS, DEPTH)
    texts[:, :, 3:] = 0  # past the end
    return {
        "row": rows(size),
        "moments": torch.randn(size, 8, 4, 4).abs(),
        "label": torch.arange(size) % 3,
        "style": torch.arange(size) % 2,
        "text_caption": texts[0],
        "text_other": texts[1],
    }


def task_of(network: str, **conditions: ConditionConfig) -> DiffusionTask:
    config = DiffusionConfig(latents="x", denoiser=SMALL[network], conditions=conditions)
    return DiffusionTask(config, HEADER, seed=0)


def revived(model: torch.nn.Module) -> torch.nn.Module:
    """Transformers start with gates of zero, behind which nothing can be seen."""
    torch.manual_seed(3)
    for p in model.parameters():
        if not p.abs().sum():
            p.data.normal_(std=0.1)
    return model


def test_conditions_are_dropped_and_captions_drawn_as_often_as_configured() -> None:
    size = 20_000
    condition = learned(EVERYTHING, batch_of(size), 0)
    gone = {
        "label": condition["label"] < 0,
        "style": condition["style"] < 0,
        "text": ~condition["text"].any(-1).any(-1),
    }
    for name, config in EVERYTHING.items():
        assert abs(gone[name].double().mean() - config.dropout) < 4 * (config.dropout / size) ** 0.5
    table = [[int((gone["label"] == a).logical_and(gone["style"] == b).sum()) for a in (0, 1)] for b in (0, 1)]
    assert stats.chi2_contingency(table).pvalue > 1e-3, "independently"
    batch, kept = batch_of(size), ~gone["text"]
    of_caption = (condition["text"][kept] == batch["text_caption"][kept]).all(-1).all(-1)
    of_other = (condition["text"][kept] == batch["text_other"][kept]).all(-1).all(-1)
    assert (of_caption ^ of_other).all()
    assert stats.binomtest(int(of_caption.sum()), len(of_caption), 0.75).pvalue > 1e-3
    again = learned(EVERYTHING, {name: t[7:9] for name, t in batch.items()}, 0)
    assert all(torch.equal(again[name], condition[name][7:9]) for name in condition), "a function of the row"


def test_rows_without_a_label_train_as_none() -> None:
    task = task_of("unet", label=ConditionConfig(0.0))
    model, batch = task.build(), batch_of(6)
    batch["label"] = torch.tensor([-1, -1, 0, -1, 1, -1])
    task.losses(model, batch).mean().backward()
    table = model.embedding.values["label"].weight  # type: ignore[union-attr,index]
    assert table.grad is not None and (table.grad.abs().sum(1) > 0).tolist() == [True, True, False, True]  # type: ignore[union-attr]


@pytest.mark.parametrize("network", ["unet", "mmdit"])
def test_each_condition_is_seen_and_none_is_seen_of_those_taken_away(network: str) -> None:
    task = task_of(network, **EVERYTHING)
    model, batch = revived(task.network()).eval(), batch_of(3)
    condition = {"label": batch["label"], "style": batch["style"], "text": batch["text_caption"]}
    x, t = torch.randn(3, 4, 4, 4), torch.full((3,), 0.5)
    with torch.no_grad():
        whole, nothing = model(x, t, condition), model(x, t, without(condition))
        assert torch.equal(nothing, model(x, t, task.conditions.nothing(3)))
        for name in condition:
            alone = model(x, t, without(condition, keep=[name]))
            assert (alone - nothing).abs().amax((1, 2, 3)).min() > 1e-4, name
            others = [n for n in condition if n != name]
            assert (model(x, t, without(condition, keep=others)) - whole).abs().amax((1, 2, 3)).min() > 1e-4, name


def test_what_is_past_the_end_of_a_text_is_not_seen() -> None:
    """By the U-Net. An mmdit attends to it, as Stable Diffusion 3 does."""
    task, batch = task_of("unet", text=EVERYTHING["text"]), batch_of(2)
    model, x, t = task.network().eval(), torch.randn(2, 4, 4, 4), torch.full((2,), 0.5)
    long = DiffusionTask(
        task.config,
        replace(HEADER, fields=FIELDS | {n: Field("npy", (9, DEPTH)) for n in FIELDS if "text_" in n}),
        seed=0,
    ).network()
    shorter = {n: p for n, p in model.state_dict().items() if "no_text" not in n}
    long.load_state_dict(shorter, strict=False)
    text = batch["text_caption"]
    padded = torch.cat([text, torch.zeros(2, 4, DEPTH)], 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, {"text": text}), long.eval()(x, t, {"text": padded}))


def test_the_vector_of_a_text_is_made_of_the_mean_of_its_tokens() -> None:
    embedding = Embedding(Conditions({}, (TOKENS, DEPTH)), 6)
    text = torch.randn(2, TOKENS, DEPTH)
    text[0, 2:], text[1] = 0, 0
    vector, tokens, there = embedding({"text": text})
    assert vector is not None and tokens is not None and there is not None
    torch.testing.assert_close(vector[0], embedding.whole_text(text[0, :2].mean(0)))
    assert there.tolist() == [[True] * 2 + [False] * 3, [True] * 5]
    assert torch.equal(tokens[1].flatten(), embedding.no_text.weight[0])


@pytest.mark.parametrize("network", SMALL)
def test_every_network_trains_privately_and_equal_to_a_loop(network: str) -> None:
    conditions = {"label": ConditionConfig(0.2)} if network == "dit" else EVERYTHING
    task, batch = task_of(network, **conditions), batch_of(4)
    model = revived(task.network())
    parameters = list(model.named_parameters())
    found = clipped_sum(model, task.losses, parameters, batch, 2, 0.3, 4, ClippingPath.bookkeeping)
    expected = clipped_sum(model, task.losses, parameters, batch, 2, 0.3, 1, ClippingPath.materialise)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("network", SMALL)
def test_the_network_is_that_of_diffusers(network: str) -> None:
    """With the same weights, called as its own pipelines call it."""
    conditions = Conditions({"label": 3}) if network == "dit" else Conditions({}, (TOKENS, DEPTH))
    torch.manual_seed(0)
    model = revived(Denoiser(SMALL[network], (4, 8, 8), conditions)).eval()
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.9]), batch_of(2)["text_caption"]
    whole = model.embedding.whole_text(text[:, :3].mean(1)) if network != "dit" else None  # type: ignore[operator,union-attr]
    with torch.no_grad():
        if network == "dit":
            found = model(x, t, {"label": torch.tensor([1, -1])})
            theirs = model.net(x, t * 1000, class_labels=torch.tensor([1, 3])).sample  # type: ignore[operator]
        elif network == "mmdit":
            found, theirs = model(x, t, {"text": text}), model.net(x, text, whole, t * 1000).sample  # type: ignore[operator]
        else:
            found, mask = model(x, t, {"text": text}), torch.tensor([[1, 1, 1, 0, 0]] * 2)
            theirs = model.net(  # type: ignore[operator]
                x, t * 1000, text, class_labels=whole, encoder_attention_mask=mask
            ).sample
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-5)


def low_task(side: int, noise: float = 0.0, network: str = "unet", dropout: float = 0.0) -> DiffusionTask:
    fields = {"moments": Field("npy", (8, 4, 4)), "low": Field("png", (3, side, side))}
    config = DiffusionConfig("x", denoiser=SMALL[network], conditions={"low": ConditionConfig(dropout, noise=noise)})
    return DiffusionTask(config, Header("x", fields, 10, 5, ()), seed=0)


def test_a_smaller_image_is_given_noise_of_a_drawn_level() -> None:
    size = 4000
    batch = {"row": rows(size), "low": torch.full((size, 1, 2, 2), 255, dtype=torch.uint8)}
    condition = learned({"low": ConditionConfig(0.25, noise=0.6)}, batch, 0)
    level, image = condition["low_noise"], condition["low"]
    gone = level == 0
    assert abs(gone.double().mean() - 0.25) < 0.03 and (image[gone] == 0).all()
    assert stats.kstest(level[~gone].numpy() / 0.6, "uniform").pvalue > 1e-3
    rest = (image - torch.sqrt(1 - level**2)[:, None, None, None])[~gone] / level[~gone][:, None, None, None]
    assert stats.kstest(rest.flatten().numpy(), "norm").pvalue > 1e-3
    plain = noisy(batch["low"][:1] // 255 * 51, torch.zeros(1), torch.randn(1, 1, 2, 2))
    torch.testing.assert_close(plain, torch.full((1, 1, 2, 2), 51 / 127.5 - 1))


@pytest.mark.parametrize("side", [2, 4, 8])
def test_a_latent_is_drawn_from_the_smaller_image(side: int) -> None:
    """Latents that are a linear map of the image, which the model has to find in every pixel of it."""
    task = low_task(side, noise=0.1)
    torch.manual_seed(0)
    model, size = task.build(), 64
    low = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8)
    pixels = torch.nn.functional.interpolate(low.float() / 127.5 - 1, (8, 8), mode="nearest")
    blocks = torch.nn.functional.pixel_unshuffle(pixels, 2)  # [12, 4, 4]
    x0 = torch.einsum("bchw,dc->bdhw", blocks, torch.randn(4, 12)) / 2
    batch = {"moments": torch.cat([x0, torch.zeros_like(x0)], 1), "low": low}
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for step in range(150):
        row = torch.stack([torch.arange(size), torch.full((size,), step), torch.zeros(size).long()], 1)
        optimizer.zero_grad()
        task.losses(model, {**batch, "row": row}).mean().backward()
        optimizer.step()
    condition = {"low": low.float() / 127.5 - 1, "low_noise": torch.zeros(size)}
    noise = torch.randn(size, 4, 4, 4)
    drawn = integrate(model.eval(), noise, condition, SamplerConfig(8), task.process)
    assert (drawn - x0).square().mean() < 0.25 * x0.var()
    shuffled = integrate(
        model, noise, {**condition, "low": condition["low"].roll(1, 0)}, SamplerConfig(8), task.process
    )
    assert (shuffled - x0).square().mean() > x0.var()


def test_a_smaller_image_is_clipped_like_everything_else_and_refused_where_it_does_not_go() -> None:
    task, batch = low_task(8, noise=0.3, dropout=0.3), batch_of(4)
    batch["low"] = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    model = task.network()
    parameters = list(model.named_parameters())
    found = clipped_sum(model, task.losses, parameters, batch, 2, 0.3, 4, ClippingPath.bookkeeping)
    expected = clipped_sum(model, task.losses, parameters, batch, 2, 0.3, 1, ClippingPath.materialise)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=2e-6)
    with pytest.raises(UserError, match=r"A low image of 3x3 does not go with latents of side 4"):
        low_task(3).network()
    with pytest.raises(UserError, match="network=mmdit has no condition 'low'"):
        low_task(8, network="mmdit").network()


@pytest.mark.parametrize(
    ("conditions", "network", "says"),
    [
        ({"hue": ConditionConfig()}, "unet", "the latents have no field 'hue'; they have label, moments"),
        (
            {"note": ConditionConfig()},
            "unet",
            r"the values of 'note' are not known; encode the latents with properties.note=",
        ),
        ({"text": ConditionConfig()}, "unet", "must name at least one caption"),
        ({"text": ConditionConfig(captions={"none": 1.0})}, "unet", r"no field 'text_none'.*text.captions"),
        ({"style": ConditionConfig()}, "dit", "has the condition 'label' and no other"),
    ],
)
def test_conditions_that_cannot_be_had(conditions: dict[str, ConditionConfig], network: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        task_of(network, **conditions).network()


def test_settings_that_mean_nothing() -> None:
    assert len(ConditionConfig(1.5).problems()) == len(ConditionConfig(captions={"a": 0.0}).problems()) == 1
    assert DenoiserConfig(Network.dit, layers=0).problems() == ["denoiser.layers must be at least 1, not 0."]
    with pytest.raises(UserError, match="do not cut into patches of 3x3"):
        Denoiser(replace(SMALL["dit"], patch=3), (4, 8, 8), Conditions({"label": 3}))
