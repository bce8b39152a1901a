import pytest
import torch
from torch import nn

from rayproj.classifiers.adapters import BRANCHES, Adapted
from rayproj.classifiers.networks import KINDS, ClassifierConfig, Network, build

VIT = {"layers": 2, "dim": 24, "heads": 3, "patch": 4, "dropout": 0.0}
CLEAN, ADVERSARIAL = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])


def vit(*kinds: str, apart: bool = True, branches: tuple[str, ...] = BRANCHES) -> Adapted:
    """Double precision; its branches differ, if they are to."""
    torch.manual_seed(0)
    config = ClassifierConfig(Network.vit, adapters=list(kinds), branches=list(branches), **VIT)  # type: ignore[arg-type]
    model = build(config, 3, 16, 5).double()
    assert isinstance(model, Adapted)
    if apart:
        for name, parameter in model.named_parameters():
            if ".branches." in name and ".branches.0." not in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
            elif name in ("tokens", "positions"):
                parameter.data[1:] += 0.3 * torch.randn_like(parameter[1:])
    return model.eval()


def images(count: int = 4) -> torch.Tensor:
    return 255 * torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("kinds", [[kind] for kind in KINDS] + [list(KINDS)], ids="+".join)
def test_images_of_both_branches_in_one_pass_are_those_of_two(kinds: list[str]) -> None:
    model, x = vit(*kinds), images()
    mix = torch.cat([CLEAN, ADVERSARIAL, torch.tensor([[0.3, 0.7]]), torch.tensor([[1.4, -0.4]])])
    together = model(x, mix)
    for i in range(4):
        torch.testing.assert_close(model(x[i : i + 1], mix[i : i + 1]), together[i : i + 1], rtol=0, atol=1e-6)
    assert not torch.allclose(model(x, CLEAN.expand(4, 2)), model(x, ADVERSARIAL.expand(4, 2)))
    torch.testing.assert_close(model(x), model(x, CLEAN.expand(4, 2)))


@pytest.mark.parametrize("kinds", [["token"], list(KINDS)], ids="+".join)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 1.5])
def test_a_merged_network_is_the_mixture(kinds: list[str], weight: float) -> None:
    model, x, mix = vit(*kinds), images(), torch.tensor([weight, 1 - weight])
    merged = model.merged(mix)
    plain = build(ClassifierConfig(Network.vit, **VIT), 3, 16, 5)  # type: ignore[arg-type]
    assert set(merged.state_dict()) == set(plain.state_dict())
    torch.testing.assert_close(merged(x), model(x, mix.expand(4, 2)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kinds", [["token"], list(KINDS)], ids="+".join)
def test_there_may_be_a_branch_for_each_threat(kinds: list[str]) -> None:
    """Images of four branches and of a mixture of them in one pass, against networks with one branch each."""
    model, x = vit(*kinds, branches=("clean", "linf", "l2", "l1")), images(5)
    mix = torch.cat([torch.eye(4), torch.tensor([[0.1, 0.5, 0.6, -0.2]])])
    together = model(x, mix)
    for i in range(5):
        torch.testing.assert_close(model.merged(mix[i])(x[i : i + 1]), together[i : i + 1], rtol=0, atol=1e-6)
    assert (torch.pdist(model(x[:1].expand(4, -1, -1, -1), torch.eye(4))) > 1e-3).all()
    torch.testing.assert_close(model(x), model(x, torch.eye(4)[:1].expand(5, 4)))
    assert model.own_parameters() == 3 * vit(*kinds).own_parameters()
    model.zero_grad()
    model(x[:1], torch.eye(4)[2:3]).square().sum().backward()
    touched = [bool(gradient.any()) for gradient in model.tokens.grad]
    assert touched == [False, False, True, False]


def test_equal_branches_are_one_network() -> None:
    model, x = vit(*KINDS, apart=False), images()
    for mix in (CLEAN, ADVERSARIAL, torch.tensor([[0.2, 0.8]])):
        torch.testing.assert_close(model(x, mix.expand(4, 2)), model(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kinds", [["token"], ["norms"], list(KINDS)], ids="+".join)
def test_each_branch_learns_from_its_own_images_alone(kinds: list[str]) -> None:
    model, x = vit(*kinds), images()
    own = {"tokens", "positions"}
    gradients = []
    for mix in (CLEAN, ADVERSARIAL):
        model.zero_grad()
        model(x, mix.expand(4, 2)).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name in gradients[0]:
        for branch, found in enumerate(gradients):
            if name in own:
                assert not found[name][1 - branch].any() and found[name][branch].any()
            elif f".branches.{1 - branch}." in name:
                assert not found[name].any()
    model.zero_grad()
    both = model(torch.cat([x, x]), torch.cat([CLEAN.expand(4, 2), ADVERSARIAL.expand(4, 2)]))
    both.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[0][name] + gradients[1][name], rtol=1e-5, atol=1e-6)


def test_what_a_second_branch_costs() -> None:
    assert vit("token").own_parameters() == 24
    assert (
        vit("norms").own_parameters() == (2 * 2 + 1) * 2 * 24
    )  # layer norms of two layers and the last, scale and shift
    # ViT-B/16: a token of 768 against 25 norms of 2 x 768, which are 50 times as many.
    base = {"layers": 12, "dim": 768, "heads": 12, "patch": 16}
    sizes = []
    for kind in ("token", "norms"):
        with torch.device("meta"):
            model = build(ClassifierConfig(Network.vit, adapters=[kind], **base), 3, 224, 1000)  # type: ignore[arg-type]
        sizes.append(model.own_parameters())  # type: ignore[operator]
    assert sizes == [768, 38400]


def test_norms_of_other_networks() -> None:
    torch.manual_seed(0)
    model = build(ClassifierConfig(channels=(8, 16), adapters=["norms", "head"]), 3, 16, 5)
    assert isinstance(model, Adapted)
    assert model.own_parameters() == 2 * 2 * (8 + 16) + 16 * 5 + 5
    assert not [m for m in model.network.modules() if isinstance(m, nn.GroupNorm)] or model(images().float()).shape == (
        4,
        5,
    )
