"""Stand-ins for medical sets that may not be handed on: their files and columns, with images of noise in which the class,
and the hospital or site, can be told."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

OBSERVATIONS = (
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,"
    "Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
# As it is in the NIH's file: two names have a comma.
NIH_COLUMNS = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],"
    "OriginalImagePixelSpacing[x,y],"
)


def write_csv(path: Path, columns: str, rows: Iterable[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(columns + "\n")
        csv.writer(file, lineterminator="\n").writerows(rows)


def picture(path: Path, number: int, side: int, channels: int, bright: bool, tint: int = 0) -> None:
    """Its brightness is the class, its tint the site; no two numbers give the same."""
    noise = np.random.default_rng(number).integers(0, 60, (side, side, channels))
    noise = noise + (150 if bright else 20) + np.array([tint * 8, 0, 0])[:channels]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.squeeze(noise.astype(np.uint8))).save(path)


def write_camelyon17(folder: Path, slides: int = 2, patches: int = 4, side: int = 96) -> None:
    """camelyon17_v1.0 and camelyon17_unlabeled_v1.0, from five hospitals each."""
    number = 0
    for name in ("camelyon17_v1.0", "camelyon17_unlabeled_v1.0"):
        labelled, rows = name == "camelyon17_v1.0", []
        for hospital in range(5):
            for slide in range(slides):
                patient, node = f"{hospital * 20 + slide + (0 if labelled else 10):03d}", slide % 5
                for patch in range(patches):
                    tumour, x, y = patch % 2, 3328 + 32 * patch, 21792 + 32 * slide
                    # The table has no more than 0 and 1, of the hospitals of the other parts too.
                    split = int(patch == patches - 1)
                    place = f"patient_{patient}_node_{node}"
                    file = folder / name / "patches" / place / f"patch_{place}_x_{x}_y_{y}.png"
                    picture(file, number, side, 3, bool(tumour), hospital)
                    row = [number, patient, node, x, y, tumour if labelled else -100, slide, hospital, split]
                    rows.append(row)
                    number += 1
        write_csv(folder / name / "metadata.csv", ",patient,node,x_coord,y_coord,tumor,slide,center,split", rows)


def write_chexpert(folder: Path, patients: int = 24, side: int = 40) -> None:
    """CheXpert-v1.0-small and CHEXPERT DEMO.csv. Pleural Effusion is present, absent, blank and uncertain in turns."""
    root, people = folder / "CheXpert-v1.0-small", []
    for split, count in (("train", patients), ("valid", 4)):
        rows = []
        for patient in range(count):
            name = f"patient{patient + (1 if split == 'train' else 64541):05d}"
            effusion = ("1.0", "0.0", "", "-1.0" if split == "train" else "1.0")[patient % 4]
            sex, age = ("Male", "Female")[patient // 4 % 2], 18 + 3 * patient
            people.append([name, sex, age, PRIMARY_RACES[patient % len(PRIMARY_RACES)], "Non-Hispanic/Non-Latino"])
            for view in ("frontal", "lateral"):
                inside = f"{split}/{name}/study1/view{1 if view == 'frontal' else 2}_{view}.jpg"
                picture(root / inside, 100 * len(people) + len(view), side, 1, effusion == "1.0")
                observed = [
                    "1.0" if effusion == "" else "",
                    "",
                    "",
                    "",
                    "",
                    "0.0",
                    "",
                    "",
                    "-1.0",
                    "",
                    effusion,
                    "",
                    "",
                    "",
                ]
                position = ("AP", "PA")[patient % 2] if view == "frontal" else ""
                rows.append([f"CheXpert-v1.0-small/{inside}", sex, age, view.capitalize(), position, *observed])
        write_csv(root / f"{split}.csv", f"Path,Sex,Age,Frontal/Lateral,AP/PA,{OBSERVATIONS}", rows)
    write_csv(folder / "CHEXPERT DEMO.csv", "PATIENT,GENDER,AGE_AT_CXR,PRIMARY_RACE,ETHNICITY", people)


PRIMARY_RACES = (
    "White", "White, non-Hispanic", "Black or African American", "Asian", "Other", "Unknown", "Race and Ethnicity Unknown",
    "", "Native American",
)  # fmt: skip


def write_chestxray14(folder: Path, patients: int = 12, side: int = 40) -> None:
    """Two images of each patient, in two of the folders of the NIH."""
    rows, lists = [], {"train_val": list[str](), "test": list[str]()}
    for patient in range(1, patients + 1):
        for follow_up in range(2):
            name = f"{patient:08d}_{follow_up:03d}.png"
            findings = ("No Finding", "Effusion", "Cardiomegaly|Effusion", "Infiltration")[patient % 4]
            picture(
                folder / f"images_{1 + patient % 2:03d}" / "images" / name,
                1 + len(rows),
                side,
                1,
                "Effusion" in findings,
            )
            sex, view = "FM"[patient // 4 % 2], ("AP", "PA")[patient % 2]
            rows.append([name, findings, follow_up, patient, 15 + 5 * patient, sex, view, 2500, 2048, 0.143, 0.143, ""])
            lists["test" if patient % 3 == 0 else "train_val"].append(name)
    write_csv(folder / "Data_Entry_2017.csv", NIH_COLUMNS, rows)
    for part, names in lists.items():
        (folder / f"{part}_list.txt").write_text("\n".join(names) + "\n")


DIAGNOSES = (
    "melanocytic nevus", "melanoma", "basal cell carcinoma", "benign keratosis", "actinic keratosis",
    "squamous cell carcinoma", "vascular lesion", "dermatofibroma",
)  # fmt: skip
SITES = ("isic2019", "fitzpatrick17k", "pad_ufes_20")


def write_dermatology(folder: Path, patients: int = 24, side: int = 40) -> None:
    """A folder with labels.csv of three sites. Of ISIC there are two images of each lesion and no tones, of Fitzpatrick17k
    tones and diagnoses of its own, of PAD-UFES-20 all."""
    rows = []
    for site in SITES:
        for patient in range(patients):
            for image in range(2 if site == "isic2019" else 1):
                diagnosis = DIAGNOSES[patient % 8] if site != "fitzpatrick17k" else ("psoriasis", "acne")[patient % 2]
                name = f"{site}/{patient:03d}_{image}.jpg"
                picture(folder / name, 1 + len(rows), side, 3, diagnosis.startswith("melan"), patient % 3)
                sex = "" if site == "fitzpatrick17k" else ("female", "male", "")[patient // 3 % 3]
                tone = "" if site == "isic2019" else ("1", "2", "3", "4", "5", "6", "")[patient % 7]
                rows.append([name, diagnosis, 20 + patient, sex, tone, site, f"{site}-{patient}"])
    write_csv(folder / "labels.csv", "file,diagnosis,age,sex,skin_tone,site,patient", rows)
