"""A folder of images with a CSV of labels, attributes and splits, of one or of many sites.

A site, such as a clinic, is a role where `split_column` is the column of the site and `roles` says which is which. Of the
public sets of skin images such a CSV is soon written: ISIC 2019 (one-hot columns MEL, NV, BCC, AK, BKL, DF, VASC, SCC, UNK;
and image, age_approx, sex, lesion_id), PAD-UFES-20 (img_id, diagnostic, age, gender, fitspatrick, patient_id) and
Fitzpatrick17k (md5hash, label, fitzpatrick_scale). Their diagnoses have different names, which is for its writer to settle.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rayproj.data.sources.base import Source, SourceConfig
from rayproj.data.sources.table import Row, Table, source
from rayproj.data.split import TRAIN, UNLABELLED


def open(config: SourceConfig) -> Source:
    folder = Path(config.path)
    wanted = [config.file_column, config.label_column, *config.attributes]
    wanted += [c for c in (config.split_column, config.group_column) if c]
    table = Table(folder / config.csv, wanted, "give source.path the folder and source.csv the file in it")
    # An empty label is none; labels that are not used need not be those of the others.
    used = (values for _, values in table.lines() if _role(config, values) not in ("", UNLABELLED))
    classes = tuple(sorted({values[config.label_column] for values in used} - {""}))
    number = {name: k for k, name in enumerate(classes)}

    def rows() -> Iterator[Row]:
        for line, values in table.lines():
            name = values[config.file_column]
            yield Row(
                path=f"{folder}/{name}",
                label=number.get(values[config.label_column], -1),
                split=_split(config, values),
                group=values[config.group_column] if config.group_column else name,
                attributes={attribute: values[attribute] for attribute in config.attributes},
                line=line,
                table=config.csv,
            )

    return source(config, folder.name, classes, config.attributes, rows, {})


def _split(config: SourceConfig, values: dict[str, str]) -> str:
    return values[config.split_column] if config.split_column else TRAIN


def _role(config: SourceConfig, values: dict[str, str]) -> str:
    split = _split(config, values)
    return config.roles.get(split, split)
