"""ChestX-ray14 of the NIH (Wang et al. 2017): frontal chest radiographs with 14 findings drawn from their reports.

`source.path` is a folder with Data_Entry_2017.csv or Data_Entry_2017_v2020.csv, train_val_list.txt, test_list.txt, and the
images in images_001/images/ to images_012/images/ or in images/. `source.label_column` is the finding that is the label,
under the name that CheXpert has for it: "Pleural Effusion" is their Effusion.

A group is a patient. Parts are those of the two lists, train_val and test, whose patients differ; here ood_val and
ood_test, since these are the images that classifiers of CheXpert are judged on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rayproj.data.sources.base import Source, SourceConfig
from rayproj.data.sources.chest import SEXES, age_group, classes, target
from rayproj.data.sources.table import Row, Table, group_of, source
from rayproj.errors import UserError

FINDINGS = (
    "No Finding", "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion", "Emphysema", "Fibrosis",
    "Hernia", "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax",
)  # fmt: skip
THEIR_NAMES = {"Pleural Effusion": "Effusion"}
ROLES = {"train_val": "ood_val", "test": "ood_test"}
COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "View Position")
SEX_COLUMNS = ("Patient Gender", "Patient Sex")  # of 2017 and of later copies
ATTRIBUTES = ("sex", "age", "age_group", "view", "patient")


def open(config: SourceConfig) -> Source:
    finding, folder = target(config, FINDINGS), Path(config.path)
    name = THEIR_NAMES.get(finding, finding)
    entries = [folder / f"Data_Entry_2017{version}.csv" for version in ("", "_v2020")]
    path = next((entry for entry in entries if entry.exists()), entries[0])
    table = Table(path, COLUMNS, "give source.path the folder with it, the two lists and the images")
    sex = next((column for column in SEX_COLUMNS if column in table.columns), "")
    if not sex:
        raise UserError(f"'{path}' has no column 'Patient Gender'; it has {', '.join(table.columns)}.")
    part = {image: split for split in ROLES for image in _listed(folder / f"{split}_list.txt")}
    where = {
        file.name: str(file) for pattern in ("images/*.png", "images_*/images/*.png") for file in folder.glob(pattern)
    }

    def rows() -> Iterator[Row]:
        for line, values in table.lines():
            image, patient = values["Image Index"], values["Patient ID"]
            if image not in part:
                raise UserError(f"'{image}' of line {line} of '{path.name}' is in none of the lists; fetch both again.")
            found = {
                "sex": SEXES.get(values[sex], ""),
                "age": values["Patient Age"],
                "age_group": age_group(values["Patient Age"]),
                "view": values["View Position"],
                "patient": patient,
            }
            label = int(name in values["Finding Labels"].split("|"))
            file, group = where.get(image, f"{folder}/images/{image}"), group_of(config, found, patient)
            yield Row(file, label, part[image], group, found, line, path.name)

    attribution = "ChestX-ray14, NIH Clinical Center; Wang et al. 2017"
    return source(config, "ChestX-ray14", classes(finding), ATTRIBUTES, rows, ROLES, "", attribution)


def _listed(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except FileNotFoundError:
        raise UserError(f"There is no '{path}', the list of the images of that part; fetch it again.") from None
