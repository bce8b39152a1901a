"""The averaged weights of a run in formats that load without this project: `rayproj export RUN --to DIR`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from omegaconf import OmegaConf

from rayproj.errors import UserError
from rayproj.export.card import Card, render
from rayproj.export.classifier import write_classifier
from rayproj.export.diffusion import write_autoencoder, write_pipeline
from rayproj.storage.store import Store


def export(run_dir: str, to: str) -> Path:
    """Write the newest averaged weights of a run, with a model card, into a new folder.

    A diffusion run becomes a diffusers pipeline with its code, an autoencoder run a diffusers `AutoencoderKL` in `vae/`,
    a classifier run `model.safetensors`, `config.json` and the torch.export program `model.pt2`; of an epinet there is also
    `epinet.safetensors`, all but its base, with the base's digest.

    Args:
        run_dir: of jobs/train_diffusion.py, finetune_private.py, train_classifier.py or train_autoencoder.py.
        to: a local folder that is empty or not there. It appears when it is complete.

    Raises:
        UserError: no run, no model in it, no commit yet, a private run that is not finished, or `to` is taken.
    """
    target = Path(to).expanduser().resolve()
    if "://" in to:
        raise UserError(f"--to must be a local folder, not '{to}'; copy it there afterwards.")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"'{to}' is there already and not an empty folder; give --to another name, or delete it.")
    run = Store(run_dir)
    if not run.exists("config.yaml"):
        raise UserError(f"There is no run at '{run_dir}'; give the run dir of a training job.")
    write = _writer(run)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise UserError(f"Nothing can be written to '{to}' ({error}); give --to another place.") from error
    with scratch:
        folder = Path(scratch.name) / target.name  # one more level: the scratch folder is closed to all but its owner
        folder.mkdir()
        card = write(run, folder)
        (folder / "README.md").write_text(render(card, run), encoding="utf-8")
        for file in folder.rglob("*.safetensors"):  # which safetensors closes to all but their owner
            shutil.copymode(folder / "README.md", file)
        try:
            folder.rename(target)
        except OSError as error:
            raise UserError(f"'{to}' cannot be put in place ({error}); give --to a name that is free.") from error
    return target


def _writer(run: Store) -> Callable[[Store, Path], Card]:
    """What exports the run, by the section of its config that describes a model."""
    config = OmegaConf.to_container(OmegaConf.create(run.read("config.yaml").decode()))
    assert isinstance(config, dict)
    writers = {"diffusion": write_pipeline, "classifier": write_classifier, "autoencoder": write_autoencoder}
    for name, write in writers.items():
        if isinstance(config.get(name), dict):  # encode_latents has the path of an autoencoder there
            return write
    raise UserError(
        f"The run '{run.uri}' is of a job that trains no model; give the run dir of train_diffusion, finetune_private, "
        "train_classifier or train_autoencoder."
    )
