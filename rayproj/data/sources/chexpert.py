"""CheXpert (Irvin et al. 2019): chest radiographs with 14 observations drawn from their reports.

`source.path` is the folder CheXpert-v1.0 or CheXpert-v1.0-small, with train.csv, valid.csv and the images in train/ and
valid/; `source.label_column` is the observation that is the label. Blank is not mentioned, which counts as absent; what is
uncertain (-1) goes by `source.uncertain`. Frontal views alone are taken, since ChestX-ray14 has no others. Race is known if
`source.demographics` is the separate file CHEXPERT DEMO.xlsx, saved as CSV (its columns PATIENT and PRIMARY_RACE); its many
wordings become White, Black, Asian or Other.

A group is a patient. Parts are train and valid, the 200 studies that radiologists labelled, here id_val; data.fractions
makes a test set of patients of train.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rayproj.data.sources.base import Source, SourceConfig
from rayproj.data.sources.chest import SEXES, age_group, classes, target
from rayproj.data.sources.table import Row, Table, group_of, number, source
from rayproj.errors import UserError

OBSERVATIONS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
ROLES = {"train": "train", "valid": "id_val"}
COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA")
ATTRIBUTES = ("sex", "age", "age_group", "view", "patient")
RACES = ("White", "Black", "Asian")


def open(config: SourceConfig) -> Source:
    finding = target(config, OBSERVATIONS)
    remedy = "give source.path the folder CheXpert-v1.0 or CheXpert-v1.0-small"
    tables = {split: Table(Path(config.path) / f"{split}.csv", [*COLUMNS, finding], remedy) for split in ROLES}
    races = _races(config.demographics) if config.demographics else {}
    attributes = (*ATTRIBUTES, "race") if config.demographics else ATTRIBUTES

    def rows() -> Iterator[Row]:
        for split, table in tables.items():
            for line, values in table.lines():
                if values["Frontal/Lateral"] != "Frontal":
                    continue
                # The first folder of a path is that of the whole set, whatever it is called here.
                inside = values["Path"].partition(f"{split}/")[2]
                patient = inside.partition("/")[0]
                found = {
                    "sex": SEXES.get(values["Sex"], ""),
                    "age": values["Age"],
                    "age_group": age_group(values["Age"]),
                    "view": values["AP/PA"],
                    "patient": patient,
                    "race": races.get(patient, ""),
                }
                group = group_of(config, found, patient)
                said = int(number(values, finding, line, table.path.name))
                label = config.uncertain.label if said < 0 else said
                path = f"{config.path}/{split}/{inside}"
                yield Row(path, label, split, group, found, line, table.path.name)

    attribution = "CheXpert, Stanford ML Group; Irvin et al. 2019"
    licence = "Stanford University Dataset Research Use Agreement"
    return source(config, "CheXpert", classes(finding), attributes, rows, ROLES, licence, attribution)


def _races(path: str) -> dict[str, str]:
    remedy = "save CHEXPERT DEMO.xlsx as CSV and give source.demographics that"
    table = Table(Path(path), ["PATIENT", "PRIMARY_RACE"], remedy)
    found = {}
    for _, values in table.lines():
        said = values["PRIMARY_RACE"]
        known = said and not any(word in said.lower() for word in ("unknown", "refused"))
        found[values["PATIENT"]] = next((race for race in RACES if race in said), "Other") if known else ""
    if not any(found.values()):
        raise UserError(f"'{path}' knows nobody's PRIMARY_RACE; leave source.demographics out.")
    return found
