import json
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from rayproj.classifiers.networks import ClassifierConfig, EfficientNetLite0, Network, VisionTransformer, build
from rayproj.errors import UserError
from rayproj.evaluation.features import EfficientNetLite0Features

SMALL = {
    Network.conv: ClassifierConfig(channels=(8, 16)),
    Network.wide_resnet: ClassifierConfig(Network.wide_resnet, depth=10, width=1),
    Network.vit: ClassifierConfig(Network.vit, layers=2, dim=24, heads=3, patch=4),
    Network.efficientnet_lite0: ClassifierConfig(Network.efficientnet_lite0),
}


@pytest.mark.parametrize("kind", list(Network))
def test_an_image_is_taken_for_the_same_in_any_company_and_as_uint8_or_float(kind: Network) -> None:
    torch.manual_seed(0)
    model = build(SMALL[kind], 3, 32, 5).eval()
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    logits = model(images)
    assert logits.shape == (6, 5) and logits.dtype is torch.float32
    torch.testing.assert_close(model(images.float()), logits)
    torch.testing.assert_close(model(images[2:3]), logits[2:3], rtol=1e-4, atol=1e-5)


def test_a_wide_resnet_has_the_published_number_of_weights() -> None:
    model = build(ClassifierConfig(Network.wide_resnet, depth=28, width=10), 3, 32, 10)
    # WRN-28-10 has 36.5 M (Zagoruyko and Komodakis 2016, table 5).
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(36.5e6, rel=2e-3)


def test_efficientnet_has_the_features_that_were_published_in_training_too() -> None:
    known, ours = EfficientNetLite0Features(64), build(ClassifierConfig(Network.efficientnet_lite0), 1, 64, 5)
    assert isinstance(ours, EfficientNetLite0)
    images = torch.randint(0, 256, (3, 1, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(ours.train().pooled(images), known(images), rtol=1e-4, atol=1e-4)
    ours.head.weight.data, ours.head.bias.data = known.model._fc.weight.data, known.model._fc.bias.data
    torch.testing.assert_close(ours.eval()(images), known.logits(images), rtol=1e-4, atol=1e-3)
    names = [name for name, _ in ours.named_parameters()]
    assert "head.weight" in names and not any("_fc" in name for name in names)


def test_a_vit_of_transformers_keeps_its_logits_and_its_own_normalisation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
                  patch_size=4, num_labels=4)
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    ours = build(ClassifierConfig(Network.vit, weights=str(tmp_path)), 3, 16, 4).eval()
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    x = (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(ours(images), theirs(x).logits, rtol=1e-4, atol=1e-5)
    other = build(ClassifierConfig(Network.vit, weights=str(tmp_path)), 3, 16, 7)  # a new head for other classes
    assert isinstance(other, VisionTransformer) and other(images).shape == (3, 7)


def test_weights_that_are_not_there_or_for_other_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model of transformers at '/nowhere'"):
        build(ClassifierConfig(Network.vit, weights="/nowhere"), 3, 16, 4)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16, patch_size=4
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a side of 16, and these have 1 and 32"):
        build(ClassifierConfig(Network.vit, weights=str(tmp_path)), 1, 32, 4)
    with pytest.raises(UserError, match="32 pixels at least"):
        build(ClassifierConfig(Network.efficientnet_lite0), 3, 28, 4)


def test_what_a_config_cannot_be() -> None:
    assert ClassifierConfig(Network.wide_resnet, depth=27).problems()
    assert ClassifierConfig(Network.vit, dim=20, heads=3).problems()
    assert ClassifierConfig(adapters=["token"]).problems() == [
        "classifier.adapters: 'token' is none of norms, patches, head for conv."
    ]
    assert ClassifierConfig(Network.vit, adapters=["token", "norms"]).problems() == []
