"""Camelyon17-WILDS (Koh et al. 2021, "WILDS", section 4.1.2): 96-pixel patches of lymph nodes from five hospitals, with and
without tumour in their middle 32 pixels.

`source.path` is the folder camelyon17_v1.0 of its downloader: metadata.csv, and patches/patient_P_node_N/ with the images.
`source.unlabelled` is camelyon17_unlabeled_v1.0, of the same layout, with patches of other slides (Sagawa et al. 2022).

Parts are those of the package wilds: train, id_val, val (all of hospital 1) and test (all of hospital 2), here train,
id_test, ood_val and ood_test. Of the unlabelled, train_unlabeled (from the hospitals of train) belongs to train;
val_unlabeled and test_unlabeled are left out unless `source.roles` says otherwise.

id_val was drawn patch by patch from the slides of train, so no group larger than a patch keeps them apart, and a patch is
the group unless `source.group_column` names an attribute. For a test in the domain on other slides, give
roles={id_val: train}, group_column=slide and data.fractions={train: 0.9, id_test: 0.1}.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rayproj.data.sources.base import Source, SourceConfig
from rayproj.data.sources.table import Row, Table, group_of, number, source

CLASSES = ("normal", "tumour")
ROLES = {
    "train": "train",
    "id_val": "id_test",
    "val": "ood_val",
    "test": "ood_test",
    "train_unlabeled": "train",
    "val_unlabeled": "",
    "test_unlabeled": "",
}
ATTRIBUTES = ("hospital", "slide", "patient")
OUT_OF_DOMAIN = {"1": "val", "2": "test"}  # by hospital, whatever the column `split` says
SPLITS = {"0": "train", "1": "id_val"}
PLACE = ("patient", "node", "x_coord", "y_coord", "center")


def open(config: SourceConfig) -> Source:
    remedy = "give {} the folder that the package wilds downloads"
    labelled = Table(Path(config.path) / "metadata.csv", [*PLACE, "tumor", "split"], remedy.format("source.path"))
    unlabelled = None
    if config.unlabelled:
        unlabelled = Table(Path(config.unlabelled) / "metadata.csv", PLACE, remedy.format("source.unlabelled"))

    def rows() -> Iterator[Row]:
        for line, values in labelled.lines():
            split = OUT_OF_DOMAIN.get(values["center"], SPLITS.get(values["split"], values["split"]))
            label = int(number(values, "tumor", line, labelled.path.name))
            yield _row(config, config.path, line, values, label, split)
        for line, values in unlabelled.lines() if unlabelled else ():
            split = OUT_OF_DOMAIN.get(values["center"], "train") + "_unlabeled"
            yield _row(config, config.unlabelled, line, values, -1, split)

    attribution = "Camelyon17 (Bándi et al. 2018), as patches in WILDS (Koh et al. 2021; Sagawa et al. 2022)"
    return source(config, "Camelyon17-WILDS", CLASSES, ATTRIBUTES, rows, ROLES, "CC0", attribution)


def _row(config: SourceConfig, folder: str, line: int, values: dict[str, str], label: int, split: str) -> Row:
    slide = f"patient_{values['patient']}_node_{values['node']}"
    patch = f"patch_{slide}_x_{values['x_coord']}_y_{values['y_coord']}"
    # The table's own numbers of slides are another thing in each of the two sets.
    attributes = {"hospital": values["center"], "slide": slide, "patient": values["patient"]}
    group = group_of(config, attributes, patch)
    return Row(f"{folder}/patches/{slide}/{patch}.png", label, split, group, attributes, line, "metadata.csv")
