"""The layouts of medical sets: every column read as it is meant, roles, and one clear sentence for what is wrong."""

import csv
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayproj.data import importing
from rayproj.data.dataset import Dataset
from rayproj.data.importing import ImportConfig, import_dataset
from rayproj.data.leaks import Leaks
from rayproj.data.reader import Reader
from rayproj.data.sources import SourceConfig, SourceKind, Uncertain, open_source, table
from rayproj.data.sources.chest import age_group
from rayproj.errors import UserError
from tests.support import medical


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("medical")
    medical.write_camelyon17(folder, side=24)
    medical.write_chexpert(folder)
    medical.write_chestxray14(folder / "nih")
    medical.write_dermatology(folder / "skin")
    return folder


def camelyon17(files: Path, **more: Any) -> SourceConfig:
    both = {"path": f"{files}/camelyon17_v1.0", "unlabelled": f"{files}/camelyon17_unlabeled_v1.0"}
    return SourceConfig(**{"kind": SourceKind.camelyon17, "image_size": 24, **both, **more})


def chexpert(files: Path, **more: Any) -> SourceConfig:
    common = {"path": f"{files}/CheXpert-v1.0-small", "image_size": 32, "label_column": "Pleural Effusion"}
    return SourceConfig(**{"kind": SourceKind.chexpert, **common, **more})


def chestxray14(files: Path, **more: Any) -> SourceConfig:
    common = {"path": f"{files}/nih", "image_size": 32, "label_column": "Pleural Effusion"}
    return SourceConfig(**{"kind": SourceKind.chestxray14, **common, **more})


def skin(files: Path, **more: Any) -> SourceConfig:
    columns = {"label_column": "diagnosis", "split_column": "site", "group_column": "patient"}
    roles = {"isic2019": "train", "fitzpatrick17k": "unlabelled", "pad_ufes_20": "ood_test"}
    kept = {"attributes": ["age", "sex", "skin_tone", "site", "patient"], "roles": roles}
    return SourceConfig(
        **{"kind": SourceKind.image_folder, "path": f"{files}/skin", "image_size": 32, **columns, **kept, **more}
    )


def imported(source: SourceConfig, out: Path, **more: Any) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """What an import says, and all that is in its parts."""
    result = import_dataset(ImportConfig(source=source, out=str(out), shard_size=16, **more), lambda event: None)
    parts = {}
    for part in result["parts"]:
        dataset = Dataset.open(f"{out}/{part}")
        parts[part] = Reader(dataset).gather(np.arange(dataset.header.num_samples))
    return result, parts


def test_camelyon17_as_wilds_splits_it(files: Path, tmp_path: Path) -> None:
    _, parts = imported(camelyon17(files), tmp_path)
    # Of 3 hospitals 2 slides of 4 patches, the last of each for validation; of 1 and 2 all. Unlabelled: those of the 3.
    counts = {part: Counter(columns["label"].tolist()) for part, columns in parts.items()}
    assert counts == {
        "train": {0: 12, 1: 6},
        "id_test": {1: 6},
        "ood_val": {0: 4, 1: 4},
        "ood_test": {0: 4, 1: 4},
        "unlabelled": {-1: 24},
    }
    hospitals = {part: sorted(set(columns["hospital"])) for part, columns in parts.items()}
    assert hospitals == {
        "train": ["0", "3", "4"],
        "id_test": ["0", "3", "4"],
        "ood_val": ["1"],
        "ood_test": ["2"],
        "unlabelled": ["0", "3", "4"],
    }
    assert Dataset.open(f"{tmp_path}/train").header.classes == ("normal", "tumour")
    for columns in parts.values():  # the stand-ins' brightness is their class, and their red the hospital
        bright = columns["image"][:, 2].mean((1, 2)) > 100
        labelled = columns["label"] >= 0
        assert (bright == columns["label"])[labelled].all()
        red = columns["image"][:, 0].mean((1, 2)) - columns["image"][:, 2].mean((1, 2))
        assert np.abs(red / 8 - columns["hospital"].astype(float)).max() < 1


def test_unlabelled_images_of_another_hospital_and_a_split_by_slide(files: Path, tmp_path: Path) -> None:
    unseen = {"train_unlabeled": "", "test_unlabeled": "train"}
    _, parts = imported(camelyon17(files, roles=unseen), tmp_path / "unseen")
    assert set(parts["unlabelled"]["hospital"]) == {"2"} and len(parts["train"]["label"]) == 18
    with pytest.raises(UserError, match=r"The group 'patient_.*' is in the parts 'train' and 'id_test'"):
        imported(camelyon17(files, group_column="slide"), tmp_path / "refused")
    by_slide = camelyon17(files, group_column="slide", roles={"id_val": "train"})
    fractions = {"train": 0.6, "id_test": 0.4}
    result, parts = imported(by_slide, tmp_path / "slides", fractions=fractions, seed=1)
    train, test = (set(parts[part]["slide"]) for part in ("train", "id_test"))
    assert train and test and not (train | set(parts["unlabelled"]["slide"])) & test
    assert (
        len(parts["train"]["label"]) + len(parts["id_test"]["label"]) == 24 and (parts["id_test"]["label"] >= 0).all()
    )
    # Unlabelled patches of slides that fall to the test are of no use to it.
    assert result["left_out"]["without a label"]["id_test"] + len(parts["unlabelled"]["label"]) == 24


@pytest.mark.parametrize("policy", Uncertain)
def test_chexpert_by_a_plain_reading_of_its_table(files: Path, tmp_path: Path, policy: Uncertain) -> None:
    source = chexpert(files, uncertain=policy, demographics=f"{files}/CHEXPERT DEMO.csv")
    result, parts = imported(source, tmp_path)
    expected: dict[str, list[Any]] = {"train": [], "unlabelled": [], "id_val": []}
    means = {"": 0, "0.0": 0, "1.0": 1, "-1.0": {"zeros": 0, "ones": 1, "unlabelled": -1}[policy.value]}
    for split in ("train", "valid"):
        with (files / "CheXpert-v1.0-small" / f"{split}.csv").open() as file:
            for row in csv.DictReader(file):
                if row["Frontal/Lateral"] == "Frontal":
                    label = means[row["Pleural Effusion"]]
                    part = "id_val" if split == "valid" else "train" if label >= 0 else "unlabelled"
                    expected[part].append(
                        [row["Path"].split("/")[2], row["Sex"].lower(), row["Age"], row["AP/PA"], label]
                    )
    for part, rows in expected.items():
        columns = parts.get(part, {name: np.empty(0) for name in ("patient", "sex", "age", "view", "label")})
        found = zip(*(columns[name].tolist() for name in ("patient", "sex", "age", "view", "label")), strict=True)
        assert sorted(map(list, found)) == sorted(rows), part
    assert Counter(parts["id_val"]["label"].tolist()) == {0: 2, 1: 2}
    assert result["parts"]["train"]["class_counts"].keys() == {"no Pleural Effusion", "Pleural Effusion"}
    races = dict(zip(parts["train"]["patient"], parts["train"]["race"], strict=True))
    assert races["patient00001"] == races["patient00002"] == "White" and races["patient00003"] == "Black"
    said = [races[f"patient{n:05d}"] for n in (5, 6, 7, 9)]
    assert said == ["Other", "", "", "Other"]
    assert parts["train"]["image"].shape[1:] == (1, 32, 32)


def test_the_two_chest_sets_have_the_same_classes_groups_and_words(files: Path, tmp_path: Path) -> None:
    _, ours = imported(chexpert(files), tmp_path / "stanford", fractions={"train": 0.7, "id_test": 0.3})
    _, theirs = imported(chestxray14(files), tmp_path / "nih")
    assert set(theirs) == {"ood_val", "ood_test"} and {"train", "id_test"} < set(ours)
    headers = [Dataset.open(f"{tmp_path}/{part}").header for part in ("stanford/id_test", "nih/ood_test")]
    assert headers[0].classes == headers[1].classes == ("no Pleural Effusion", "Pleural Effusion")
    assert headers[0].fields == headers[1].fields
    for name in ("sex", "view"):
        assert set(theirs["ood_val"][name]) <= set(ours["train"][name])
    listed = set((files / "nih" / "test_list.txt").read_text().split())
    with (files / "nih" / "Data_Entry_2017.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["Image Index"] in listed]
    expected = Counter((row["Patient ID"], int("Effusion" in row["Finding Labels"])) for row in rows)
    assert Counter(zip(theirs["ood_test"]["patient"], theirs["ood_test"]["label"].tolist(), strict=True)) == expected
    assert ((theirs["ood_test"]["image"].mean((1, 2, 3)) > 100) == theirs["ood_test"]["label"]).all()
    with pytest.raises(UserError, match=r"'Effusion' must name the finding .*Pleural Effusion"):
        open_source(chestxray14(files, label_column="Effusion"))


def test_ages_in_bands() -> None:
    ages = ["0", "19", "20", "58.0", "058Y", "60", "79", "80", "103", "414", "", "unknown"]
    assert [age_group(age) for age in ages] == [
        "0-19", "0-19", "20-39", "40-59", "40-59", "60-79", "60-79", "80+", "80+", "", "", "",
    ]  # fmt: skip


def test_skin_images_of_three_sites(files: Path, tmp_path: Path) -> None:
    _, parts = imported(skin(files), tmp_path, fractions={"train": 0.75, "id_test": 0.25})
    assert {part: set(columns["site"]) for part, columns in parts.items()} == {
        "train": {"isic2019"},
        "id_test": {"isic2019"},
        "unlabelled": {"fitzpatrick17k"},
        "ood_test": {"pad_ufes_20"},
    }
    header = Dataset.open(f"{tmp_path}/train").header
    assert header.classes == tuple(sorted(medical.DIAGNOSES)), "without those of a site whose labels are not used"
    assert set(parts["unlabelled"]["label"]) == {-1} and len(parts["unlabelled"]["label"]) == 24
    assert not set(parts["train"]["patient"]) & set(parts["id_test"]["patient"])
    assert len(parts["train"]["label"]) + len(parts["id_test"]["label"]) == 48
    with (files / "skin" / "labels.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["site"] == "pad_ufes_20"]
    expected = Counter((row["patient"], row["diagnosis"], row["skin_tone"], row["sex"]) for row in rows)
    test = parts["ood_test"]
    names = [header.classes[label] for label in test["label"]]
    assert Counter(zip(test["patient"], names, test["skin_tone"], test["sex"], strict=True)) == expected


def test_an_empty_label_is_none(files: Path, tmp_path: Path) -> None:
    medical.write_dermatology(tmp_path / "skin", patients=16, side=8)
    change(tmp_path / "skin" / "labels.csv", "vascular lesion", "")
    result, parts = imported(
        skin(tmp_path, roles={"isic2019": "train", "fitzpatrick17k": "", "pad_ufes_20": "ood_test"}), tmp_path / "out"
    )
    assert len(Dataset.open(f"{tmp_path}/out/train").header.classes) == 7
    assert {part: len(columns["label"]) for part, columns in parts.items()} == {
        "train": 28,
        "unlabelled": 4,
        "ood_test": 14,
    }
    assert result["left_out"]["without a label"] == {"ood_test": 2}


def test_labels_are_taken_away_where_a_part_is_to_have_none(files: Path, tmp_path: Path) -> None:
    """As for a study of how few labels do."""
    fractions = {"train": 0.2, "unlabelled": 0.6, "id_test": 0.2}
    result, parts = imported(camelyon17(files, unlabelled="", roles={"id_val": "train"}), tmp_path, fractions=fractions)
    assert set(parts["unlabelled"]["label"]) == {-1} and set(parts["train"]["label"]) <= {0, 1}
    assert sum(len(parts[part]["label"]) for part in fractions) == 24
    assert result["parts"]["unlabelled"]["class_counts"] == {}


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("source", "spoil", "more", "says"),
    [
        (
            camelyon17,
            lambda f: change(f / "camelyon17_v1.0/metadata.csv", "tumor", "cancer"),
            {},
            "no column 'tumor'; it has",
        ),
        (
            camelyon17,
            lambda f: (f / "camelyon17_v1.0/metadata.csv").unlink(),
            {},
            "no '.*metadata.csv'; give source.path",
        ),
        (
            camelyon17,
            lambda f: change(f / "camelyon17_v1.0/metadata.csv", "3360,21792,1", "3360,21792,yes"),
            {},
            "'yes' of line 3 of 'metadata.csv' is no number for 'tumor'",
        ),
        (camelyon17, None, {"unlabelled": "/nowhere"}, "no '/nowhere/metadata.csv'; give source.unlabelled the folder"),
        (camelyon17, None, {"group_column": "ward"}, "group_column='ward' is none of hospital, slide, patient"),
        (camelyon17, None, {"attributes": ["ward"]}, "has no attribute 'ward'; it has hospital, slide, patient"),
        (
            camelyon17,
            None,
            {"roles": {"holdout": "train"}},
            "has 'holdout', and the parts of Camelyon17-WILDS are train",
        ),
        (
            chexpert,
            None,
            {"label_column": "label"},
            "'label' must name the finding that is the label: one of No Finding",
        ),
        (chexpert, None, {"path": "/nowhere"}, "no '/nowhere/train.csv'; give source.path the folder CheXpert"),
        (chexpert, None, {"demographics": "/nowhere.csv"}, "no '/nowhere.csv'; save CHEXPERT DEMO.xlsx as CSV"),
        (
            chexpert,
            lambda f: (f / "CHEXPERT DEMO.csv").write_bytes(b"PK\x03\x04\xff\xfe"),
            {"demographics": "{}/CHEXPERT DEMO.csv"},
            "is no CSV file in UTF-8",
        ),
        (chestxray14, lambda f: (f / "nih/test_list.txt").unlink(), {}, "no '.*test_list.txt', the list of the images"),
        (
            chestxray14,
            lambda f: change(f / "nih/test_list.txt", "00000003_000.png\n", ""),
            {},
            r"'00000003_000.png' of line 6 of 'Data_Entry_2017.csv' is in none of the lists",
        ),
        (
            chestxray14,
            lambda f: change(f / "nih/Data_Entry_2017.csv", "Patient Gender", "Patient"),
            {},
            "no column 'Patient Gender'",
        ),
        (
            chestxray14,
            lambda f: next(f.glob("nih/images_002/images/*_001.png")).unlink(),
            {},
            "of line 3 of 'Data_Entry_2017.csv' cannot be read; put the file there or take the line out",
        ),
        (skin, lambda f: (f / "skin/labels.csv").write_text("file,diagnosis\n"), {}, "has no rows"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, source, spoil, more, says: str) -> None:  # type: ignore[no-untyped-def]
    medical.write_camelyon17(tmp_path, slides=1, side=8)
    medical.write_chexpert(tmp_path, patients=8, side=8)
    medical.write_chestxray14(tmp_path / "nih", patients=4, side=8)
    medical.write_dermatology(tmp_path / "skin", patients=3, side=8)
    if spoil:
        spoil(tmp_path)
    placed = {name: value.format(tmp_path) if isinstance(value, str) else value for name, value in more.items()}
    with pytest.raises(UserError, match=says):
        list(open_source(source(tmp_path, **placed)).samples())


def test_roles_that_mean_nothing() -> None:
    assert (
        "'holdout' is none of train, unlabelled"
        in SourceConfig(kind=SourceKind.image_folder, roles={"a": "holdout"}).problems()[0]
    )
    assert "source.roles are for image_folder" in SourceConfig(roles={"a": "train"}).problems()[0]
    assert SourceConfig(kind=SourceKind.camelyon17, roles={"val_unlabeled": "train", "id_val": ""}).problems() == []


def test_an_import_holds_no_more_images_than_a_shard_has(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are read when their shard is written, so that a set may be larger than the memory."""
    read, alive, decode, commit = list[Any](), list[int](), table.decode, importing.commit_shard

    def decoded(*given: Any) -> np.ndarray:
        image = decode(*given)
        read.append(weakref.ref(image))
        return image

    def committed(*given: Any) -> bool:
        alive.append(sum(image() is not None for image in read))
        return commit(*given)

    monkeypatch.setattr(table, "decode", decoded)
    monkeypatch.setattr(importing, "commit_shard", committed)
    imported(camelyon17(files), tmp_path, leaks=Leaks.allow)
    assert len(alive) == 7 and max(alive) <= 2 * 16 < len(read)
