"""Classifiers of every kind against the same network called directly."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rayproj import classifiers
from rayproj.classifiers.networks import ClassifierConfig, ConvNet
from rayproj.errors import UserError
from rayproj.evaluation.models import ExaminedConfig, open_classifier
from rayproj.export import export
from tests.evaluation.test_job import train_only
from tests.support.ranks import run_ranks

NAMES, MEAN, STD = ["cat", "dog", "eel"], [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 24, 24), dtype=np.uint8))


class Floats(nn.Module):
    """A network of normalised floats, as others have them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 20 * self.net(x)


@torch.no_grad()
def expected(model: nn.Module, images: torch.Tensor) -> np.ndarray:
    x = (images.double() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return model(x.float()).softmax(1).numpy()


def test_programs_and_onnx_files(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model, example = Floats().eval(), torch.zeros(2, 3, 24, 24)
    torch.jit.trace(model, example).save(str(tmp_path / "a.pt"))
    dynamic = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=dynamic), tmp_path / "a.pt2")
    conv, linear = model.net[0], model.net[4]
    weights = {"k": conv.weight, "b": conv.bias, "w": linear.weight * 20, "c": linear.bias * 20}
    nodes = [
        helper.make_node("Conv", ["x", "k", "b"], ["h"], strides=[2, 2]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "c"], ["y"], transB=1),
    ]
    shapes = (["n", 3, 24, 24], "x"), (["n", 3], "y")
    inputs, outputs = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for shape, name in shapes)
    stored = [numpy_helper.from_array(t.detach().numpy(), name) for name, t in weights.items()]
    graph = helper.make_model(
        helper.make_graph(nodes, "g", [inputs], [outputs], stored),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    onnx.save(graph, str(tmp_path / "a.onnx"))
    for batch in (1, len(IMAGES) - 1):  # files that take so many images and no others
        graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
        onnx.save(graph, str(tmp_path / f"fixed_{batch}.onnx"))
    digests = set()
    for name in ("fixed_1.onnx", f"fixed_{len(IMAGES) - 1}.onnx", "a.pt", "a.pt2", "a.onnx"):
        examined = open_classifier(ExaminedConfig(str(tmp_path / name), classes=NAMES, mean=MEAN, std=STD), "cpu")
        assert examined.classes == tuple(NAMES)
        np.testing.assert_allclose(examined(IMAGES).numpy(), expected(model, IMAGES), atol=1e-5)
        digests.add(examined.digest)
    assert len(digests) == 5
    assert np.ptp(expected(model, IMAGES), axis=0).max() > 0.01, "it can tell these images apart"
    grey = IMAGES[:, :1]
    assert examined(grey).numpy() == pytest.approx(expected(model, grey.expand(-1, 3, -1, -1)), abs=1e-5)
    (tmp_path / "names.txt").write_text("cat\n\ndog\neel\n")
    by_file = ExaminedConfig(str(tmp_path / "a.onnx"), classes_file=str(tmp_path / "names.txt"), mean=MEAN, std=STD)
    assert open_classifier(by_file, "cpu").classes == tuple(NAMES)


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(image_size=24, patch_size=8, id2label=dict(enumerate(NAMES)), initializer_range=0.5, **sizes)
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
    examined = open_classifier(ExaminedConfig(str(tmp_path)), "cpu")
    assert examined.classes == tuple(NAMES)

    def called(x: torch.Tensor) -> torch.Tensor:
        return model(pixel_values=x).logits

    np.testing.assert_allclose(examined(IMAGES).numpy(), expected(called, IMAGES), atol=1e-4)  # type: ignore[arg-type]


def test_a_run_and_its_export(tmp_path: Path) -> None:
    run_ranks(train_only, 1, str(tmp_path))
    run = str(tmp_path / "classifier")
    with (tmp_path / "classifier" / "config.yaml").open("a") as file:
        file.write("train: {steps: 60}\n")
    folder = export(run, str(tmp_path / "export"))
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (6, 1, 16, 16), dtype=np.uint8))
    with torch.no_grad():
        direct = classifiers.load(run, "cpu")(images).softmax(1).numpy()
    for path in (run, str(folder), str(folder / "model.pt2")):
        examined = open_classifier(ExaminedConfig(path), "cpu")
        assert examined.classes == ("zero", "one", "two", "three")
        np.testing.assert_allclose(examined(images).numpy(), direct, atol=1e-5)
    with pytest.raises(UserError, match="takes 1 channels, and the images have 3"):
        open_classifier(ExaminedConfig(run), "cpu")(IMAGES)


def test_efficientnet_knows_pictures(tmp_path: Path) -> None:
    from sklearn.datasets import load_sample_images

    china, flower = (torch.from_numpy(np.moveaxis(i, -1, 0).copy())[None] for i in load_sample_images().images)
    (tmp_path / "names").write_text("".join(f"n{k}\n" for k in range(1000)))
    examined = open_classifier(ExaminedConfig("efficientnet_lite0", classes_file=str(tmp_path / "names")), "cpu")
    found = torch.cat([examined(china), examined(flower)])
    assert found.sum(1).numpy() == pytest.approx(1, abs=1e-5)
    assert examined.classes[int(found[1].argmax())] == "n985", "a daisy"
    assert 698 in found[0].topk(5).indices.tolist(), "a palace"


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    for name in ("a.onnx", "a.pt", "a.pt2"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(UserError, match="cannot be loaded"):
            open_classifier(ExaminedConfig(str(tmp_path / name), classes=NAMES), "cpu")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match="cannot be loaded"):
        open_classifier(ExaminedConfig(str(tmp_path)), "cpu")
    model = ConvNet(ClassifierConfig(channels=(8,), dropout=0.0), 3, 4).eval()
    torch.jit.trace(model, IMAGES[:1]).save(str(tmp_path / "four.pt"))
    with pytest.raises(UserError, match=r"gives \(4,\) numbers for 3 classes"):
        open_classifier(ExaminedConfig(str(tmp_path / "four.pt"), classes=NAMES), "cpu")(IMAGES)
    with pytest.raises(UserError, match=r"classes_file=.* cannot be read"):
        open_classifier(ExaminedConfig("efficientnet_lite0", classes_file=str(tmp_path / "gone")), "cpu")
    assert ExaminedConfig("x", mean=[0.5]).problems() and not ExaminedConfig("x", mean=[0.5], std=[1.0]).problems()
