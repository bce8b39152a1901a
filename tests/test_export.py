"""What is exported is loaded where this project cannot be imported, by the code of its own model card, and computes what
the run's weights compute here."""

import importlib
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCard

from rayproj import classifiers
from rayproj import config as configuration
from rayproj.data.dataset import Dataset
from rayproj.diffusion import sampling
from rayproj.diffusion.autoencoder import Codec, to_unit_range
from rayproj.diffusion.process import Process, ProcessConfig
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.diffusion.task import TrainedModel
from rayproj.engine.checkpoint import load_ema
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.export import export
from rayproj.runtime.run import Run
from rayproj.storage.store import Store
from rayproj.synthesis.plan import commit_hash
from tests.support import runs as made
from tests.support.commands import ROOT, run
from tests.support.ranks import run_ranks
from tests.support.regression import Recorder

TRAIN = ["train.batch=32", "train.preview_every=0", "train.engine.ema=0.9"]
STEPS = [*TRAIN, "train.steps=12", "train.engine.optimizer.lr=5e-3"]
DENOISER = ["diffusion.denoiser={channels: [16, 32], head_dim: 16, norm_groups: 8}"]
LORA = "diffusion.lora.rank=2"


def work(world: World, root: str, stages: dict[str, list[str]]) -> None:
    """The jobs without Ray, one after another on one rank."""
    for name, words in stages.items():
        job = importlib.import_module(f"rayproj.jobs.{name}")
        config = configuration.load(job.Config, f"{ROOT}/configs/{name}.yaml", [*words, f"run.dir={root}/{name}"])
        if name == "import_data":
            job.main(config)
            continue
        with Run.open(name, config) as run:
            if name != "encode_latents":
                run.finish(job.worker(run.config, world, Recorder("a")))
                continue
            for part, uri in config.images.items():
                made.latents(f"{config.out}/{part}", Dataset.open(uri), Store(config.autoencoder))
            run.finish({})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run of each job that is exported, and of two that are not."""
    root = tmp_path_factory.mktemp("runs")
    fractions = "data.fractions={public: 0.03, private: 0.03, rest: 0.94}"
    source = ["data.source.kind=fashion_mnist", 'data.source.path=""', "data.source.image_size=32", fractions]
    latents, start = f"diffusion.latents={root}/latents", f"diffusion.init={root}/train_diffusion"
    images = f"images={{public: {root}/data/public, private: {root}/data/private}}"
    private = ["privacy.expected_batch=16", "privacy.delta=1e-4", "privacy.multiplicity=1"]
    stages: dict[str, list[str]] = {
        "import_data": [*source, f"data.out={root}/data"],
        "train_classifier": [f"data={root}/data/public", "classifier.channels=[16,32]", *STEPS],
        "train_autoencoder": [f"data={root}/data/public", "autoencoder.channels=[8,8,16]", *STEPS],
        "encode_latents": [images, f"out={root}/latents", f"autoencoder={root}/train_autoencoder"],
        "train_diffusion": [f"{latents}/public", *DENOISER, *STEPS],
        "finetune_private": [f"{latents}/private", start, *DENOISER, *private, *TRAIN, "train.steps=2", LORA],
    }
    run_ranks(work, 1, str(root), stages)
    return root


def elsewhere(folder: Path, then: str, tmp_path: Path, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    """Run the code of the card in `folder`, and `then` more of it, in a Python that refuses to import rayproj.

    Returns:
        What `then` put into the dict `out`; `given` holds the arrays.
    """
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert len(code) == 1
    np.savez(tmp_path / "given.npz", **arrays)
    refuse = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "rayproj":
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
"""
    frame = f"""
import numpy, torch
given, out = {{k: torch.from_numpy(v) for k, v in numpy.load({str(tmp_path / "given.npz")!r}).items()}}, {{}}
{then}
assert not any(name.split(".")[0] == "rayproj" for name in sys.modules)
numpy.savez({str(tmp_path / "out.npz")!r}, **out)
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    script = refuse + code[0] + frame
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return dict(np.load(tmp_path / "out.npz"))


@pytest.fixture(scope="module")
def pipeline(runs: Path) -> Path:
    return export(str(runs / "train_diffusion"), str(runs / "exported" / "pipeline"))


@pytest.fixture(scope="module")
def private(runs: Path) -> Path:
    """Exported by the command."""
    folder = runs / "exported" / "private"
    done = run(sys.executable, "-m", "rayproj.cli", "export", str(runs / "finetune_private"), "--to", str(folder))
    assert done.returncode == 0 and done.stdout.strip() == str(folder), done.stderr
    return folder


def test_the_pipeline_draws_what_our_sampler_draws(runs: Path, pipeline: Path, tmp_path: Path) -> None:
    model = TrainedModel(str(runs / "train_diffusion"), "cpu")
    names = model.header.classes
    labels = torch.tensor([0, 3, 9, 9])
    noise = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    then = f"""
assert len(images) == 2 and images[0].size == (32, 32)  # what the card draws
for name, guidance in (("plain", 1.0), ("guided", 3.0)):
    settings = dict(num_inference_steps=5, guidance_scale=guidance, latents=given["noise"])
    labels = {[names[0], 3, names[9], 9]!r}
    out[name] = pipeline(labels, output_type="latent", **settings).images
    out[name + " float"] = pipeline(labels, output_type="pt", **settings).images
    out[name + " uint8"] = numpy.stack([numpy.array(image) for image in pipeline(labels, **settings).images])
generator = [torch.Generator().manual_seed(k) for k in (5, 5)]
out["seeded"] = pipeline([2, 2], generator=generator, output_type="pt").images
try:
    pipeline("no such class")
except ValueError as error:
    assert {names[4]!r} in str(error)
else:
    raise AssertionError("a class that is not there")
"""
    found = elsewhere(pipeline, then, tmp_path, noise=noise.numpy())
    latents = {}
    for name, guidance in (("plain", 1.0), ("guided", 3.0)):
        config = SamplerConfig(steps=5, guidance=guidance)
        network = sampling.guided(model.denoiser, config)
        latents[name] = sampling.integrate(network, noise, {"label": labels}, config, model.process)
        np.testing.assert_allclose(found[name], latents[name].numpy(), atol=1e-4)
        codec = model.codec
        decoded = codec.model.decode(latents[name] * codec.std + codec.mean).clamp(-1, 1)
        np.testing.assert_allclose(found[f"{name} float"], (decoded.numpy() + 1) / 2, atol=1e-4)
        ours = codec.decode(latents[name]).numpy()[:, 0].astype(int)
        difference = np.abs(found[f"{name} uint8"].astype(int) - ours)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    # The comparison can tell labels and guidance apart, and the images are not all of one grey.
    other = sampling.integrate(model.denoiser, noise, {"label": labels.flip(0)}, SamplerConfig(steps=5), model.process)
    assert (other - latents["plain"]).abs().max() > 1e-2
    assert (latents["guided"] - latents["plain"]).abs().max() > 1e-2
    assert found["plain uint8"].std() > 3
    assert np.array_equal(found["seeded"][0], found["seeded"][1])


def test_the_scheduler_noises_as_the_flow_does(pipeline: Path) -> None:
    """Its sigma is our t: 0 is data and 1 is noise; and its steps go the same way."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(pipeline, subfolder="scheduler")
    x0, noise = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).unbind()
    for t in (0.125, 0.75, 1.0):
        ours = Process(ProcessConfig()).noised(x0, noise, torch.full((3,), t))
        theirs = scheduler.scale_noise(x0, torch.full((3,), 1000 * t), noise)
        torch.testing.assert_close(theirs, ours)
    scheduler.set_timesteps(sigmas=[1.0])
    back = scheduler.step(noise - x0, scheduler.timesteps[0], noise).prev_sample
    torch.testing.assert_close(back, x0)


def test_the_classifier_gives_our_logits_as_a_program_and_from_its_weights(runs: Path, tmp_path: Path) -> None:
    folder = export(str(runs / "train_classifier"), str(tmp_path / "classifier"))
    images = np.random.default_rng(0).integers(0, 256, (7, 1, 32, 32), dtype=np.uint8)
    then = """
import torch.nn.functional as F
from safetensors.torch import load_file

assert logits.shape == (4, 10) and set(names) <= set(classes)  # of the card
for batch in (1, 2, 7):
    out[f"program {batch}"] = model(given["images"][:batch]).numpy()
config, weights = json.load(open("config.json")), load_file("model.safetensors")
x = given["images"].float() / 127.5 - 1
for stage in range(len(config["architecture"]["channels"])):
    for conv, stride in ((6 * stage, 2), (6 * stage + 3, 1)):
        conv, norm = f"features.{conv}", f"features.{conv + 1}"
        x = F.conv2d(x, weights[conv + ".weight"], weights[conv + ".bias"], stride=stride, padding=1)
        groups = config["architecture"]["norm_groups"]
        x = F.silu(F.group_norm(x, groups, weights[norm + ".weight"], weights[norm + ".bias"]))
out["rebuilt"] = (x.mean((2, 3)) @ weights["head.weight"].T + weights["head.bias"]).numpy()
"""
    found = elsewhere(folder, then, tmp_path, images=images)
    with torch.no_grad():
        ours = classifiers.load(str(runs / "train_classifier"), "cpu")(torch.from_numpy(images)).numpy()
    assert np.ptp(ours, axis=0).max() > 1e-2, "the logits tell these images apart"
    for batch in (1, 2, 7):
        np.testing.assert_allclose(found[f"program {batch}"], ours[:batch], atol=1e-5)
    np.testing.assert_allclose(found["rebuilt"], ours, atol=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert config["input"]["shape"] == [1, 32, 32] and len(config["classes"]) == 10
    assert "None for Fashion-MNIST" in (folder / "README.md").read_text()


def test_the_autoencoder_encodes_and_decodes_as_our_codec(runs: Path, tmp_path: Path) -> None:
    folder = export(str(runs / "train_autoencoder"), str(tmp_path / "autoencoder"))
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 32, 32), dtype=np.uint8)
    then = """
mean, std = (torch.tensor(vae.config[k])[:, None, None] for k in ("latents_mean", "latents_std"))
with torch.no_grad():
    moments = vae.encode(given["images"]).latent_dist
    latents = (moments.mean - mean) / std
    out.update(latents=latents, deviations=moments.std / std, decoded=vae.decode(latents * std + mean).sample)
"""
    scaled = to_unit_range(torch.from_numpy(images))
    found = elsewhere(folder, then, tmp_path, images=scaled.numpy())
    codec = Codec.load(str(runs / "train_autoencoder"), "cpu")
    latents, deviations = codec.encode(torch.from_numpy(images))
    np.testing.assert_allclose(found["latents"], latents.numpy(), atol=1e-4)
    np.testing.assert_allclose(found["deviations"], deviations.numpy(), atol=1e-4)
    decoded = codec.model.decode(latents * codec.std + codec.mean).numpy()
    np.testing.assert_allclose(found["decoded"], decoded, atol=1e-4)


def test_the_card_says_where_the_weights_come_from_and_what_is_guaranteed(runs: Path, private: Path) -> None:
    text = (private / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "diffusers" and "latent-diffusion" in (card.data.tags or [])
    assert card.data.license is None and "license: state it" in text
    commit = load_ema(Store(str(runs / "finetune_private")))[1]
    assert commit_hash(commit) in text and "| 2 of 2 |" in text
    result = json.loads((runs / "finetune_private" / "result.json").read_text())["privacy"]
    stated, delta, examples = re.search(r"ε = (\S+) at δ = (\S+) for each of the (\d+) examples", text).groups()  # type: ignore[union-attr]
    assert 0 <= float(stated) - result["epsilon"] <= 1e-3, "rounded up"
    assert float(delta) == result["delta"] and int(examples) == result["num_samples"]
    for name in ("(private) latents", "(public)", "licence MIT", "Zalando", "None for the data of the run `train_diff"):
        assert name in text
    assert "clip_norm: 1.0" in text, "the config"


def test_adapters_are_what_was_trained_and_what_is_exported(runs: Path, private: Path) -> None:
    """Opacus issue 820: the loss and ε of adapters were sound, and those that were saved had not been trained."""
    from diffusers import UNet2DModel

    before, after = (load_ema(Store(str(runs / name)))[0] for name in ("train_diffusion", "finetune_private"))
    adapted, unet = 0, UNet2DModel.from_pretrained(private / "denoiser")
    for name, weight in unet.state_dict().items():
        full = "embedding.values.label.weight" if name == "class_embedding.weight" else f"net.{name}"
        layer, _, kind = full.rpartition(".")
        a, b = (after.get(f"{layer}.lora_{which}.default.weight") for which in "AB")
        expected = before[full].view_as(weight)
        if a is None or b is None or kind == "bias":
            assert torch.equal(weight, expected)
        else:
            assert torch.equal(after[f"{layer}.base_layer.weight"].view_as(weight), expected)
            change = b.view(-1, 2) @ a.view(2, -1)
            assert change.norm() > 1e-6
            torch.testing.assert_close(weight, expected + change)
            adapted += 1
    queries = [name for name, _ in unet.named_modules() if name.endswith("to_q")]
    assert adapted == 4 * len(queries) > 0, "and keys, values and outputs"
    trained = json.loads((runs / "finetune_private" / "result.json").read_text())["parameters"]
    assert trained == sum(t.numel() for name, t in after.items() if ".lora_" in name)


def test_nothing_of_this_machine_is_in_an_export(runs: Path, private: Path, tmp_path: Path) -> None:
    classifier = export(str(runs / "train_classifier"), str(tmp_path / "classifier"))
    secret = (runs / "finetune_private" / "secret" / "key").read_bytes()
    files = [path for folder in (private, classifier) for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 11
    for path in files:
        content = path.read_bytes()
        for mine in (str(runs).encode(), str(Path(__file__).parents[1]).encode(), secret, secret.hex().encode()):
            assert mine not in content, path
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((private / "README.md").stat().st_mode), path


def test_what_the_user_can_put_right(runs: Path, private: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in private.rglob("*")}
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text((runs / "train_classifier" / "config.yaml").read_text())
    for source, to, says in (
        (tmp_path / "nothing", tmp_path / "to", "There is no run at"),
        (runs / "import_data", tmp_path / "to", "trains no model"),
        (runs / "encode_latents", tmp_path / "to", "trains no model"),
        (bare, tmp_path / "to", "no committed checkpoint"),
        (runs / "train_classifier", private, "not an empty folder"),
        (runs / "train_classifier", bare / "config.yaml", "not an empty folder"),
        (runs / "train_classifier", bare / "config.yaml" / "to", "Nothing can be written"),
        (runs / "train_classifier", "s3://bucket/to", "must be a local folder"),
    ):
        with pytest.raises(UserError, match=says):
            export(str(source), str(to))
    assert {path: path.stat().st_mtime_ns for path in private.rglob("*")} == before
    assert list(tmp_path.iterdir()) == [bare], "nothing is left of what failed"
    done = run(sys.executable, "-m", "rayproj.cli", "export", str(bare), "--to", str(tmp_path / "to"))
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr


def test_a_private_run_is_exported_only_with_its_epsilon(runs: Path, tmp_path: Path) -> None:
    result, aside = runs / "finetune_private" / "result.json", tmp_path / "result.json"
    result.rename(aside)
    try:
        with pytest.raises(UserError, match="its ε is not known"):
            export(str(runs / "finetune_private"), str(tmp_path / "to"))
    finally:
        aside.rename(result)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_an_export_that_fails_halfway(runs: Path, tmp_path: Path) -> None:
    """The largest file does not fit, and it is the last of three; then an empty folder of that name is taken."""
    whole = export(str(runs / "train_classifier"), str(tmp_path / "whole"))
    limit = (whole / "model.pt2").stat().st_size - 1
    assert limit > (whole / "model.safetensors").stat().st_size
    (tmp_path / "to").mkdir()
    code = (
        "import resource, sys; from rayproj.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"sys.exit(main(['export', {str(runs / 'train_classifier')!r}, '--to', {str(tmp_path / 'to')!r}]))"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode != 0 and "model.pt2" in done.stderr, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "to"} and not any((tmp_path / "to").iterdir())
    export(str(runs / "train_classifier"), str(tmp_path / "to"))
    assert {path.name for path in (tmp_path / "to").iterdir()} == {path.name for path in whole.iterdir()}
