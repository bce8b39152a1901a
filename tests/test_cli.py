"""The command line itself: numbers that make no sense, files that cannot be written, and help."""

import subprocess
import sys
from pathlib import Path

import pytest

from rayproj import __version__, cli
from tests.support import images
from tests.support.commands import ROOT

TABLE = ["evaluate", "skewsize", "t.csv", "--prediction", "p", "--label", "y", "--group", "g"]
SENDING = ["submit", "jobs/train_classifier.py", "configs/train_classifier.yaml"]
PLANNING = ["plan", "chain", "configs/demo.yaml"]


@pytest.mark.parametrize(
    ("words", "option", "value", "least"),
    [
        *((TABLE, f"--{name}", "-1", 0) for name in ("permutations", "bootstraps", "top", "min-examples")),
        *((TABLE, f"--{name}", "-1", 0) for name in ("vocabulary", "rare")),
        (TABLE, "--together", "0", 1),
        *((["dataset", "show", "d", "--sheet", "s.png"], "--per-class", value, 1) for value in ("-3", "0", "x", "1.5")),
        (["gallery", "d", "g.html"], "--draws", "-2", 1),
        (["grid", "d", "g.png"], "--per-cell", "0", 1),
        (PLANNING, "--samples", "-5", 0),
        (PLANNING, "--classes", "-5", 0),
        (SENDING, "--retries", "-1", 0),
        (["study", "report", "r", "--to", "d"], "--bootstraps", "0", 1),
        *((["gc", "."], "--older-than", value, 0) for value in ("-5", "nan", "day")),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    words: list[str], option: str, value: str, least: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([*words, option, value])
    kind = "number" if option == "--older-than" else "whole number"
    assert left.value.code == 2
    assert f"error: argument {option}: '{value}' is no {kind} from {least} on" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--picture", "--residuals"])
@pytest.mark.parametrize("place", ["absent/file", "file/file", "folder"])
def test_a_file_that_cannot_be_written_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, place: str
) -> None:
    (tmp_path / "t.csv").write_text("y,p,g\n" + "a,a,x\na,b,y\n" * 20)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    words = [*TABLE[:2], str(tmp_path / "t.csv"), *TABLE[3:], "--permutations", "0", "--bootstraps", "0"]
    assert cli.main([*words, option, str(tmp_path / place)]) == 2
    said = capsys.readouterr()
    assert said.out.startswith("g: SkewSize"), "what was found is said nevertheless"
    reason = {"absent/file": "No such file or directory", "file/file": "Not a directory", "folder": "Is a directory"}
    path = tmp_path / place
    assert said.err == f"error: '{path}' cannot be read or written ({reason[place]}); give another path.\n"


def test_so_is_that_of_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = images.write(str(tmp_path / "data")).uri
    assert cli.main(["dataset", "show", uri, "--sheet", str(tmp_path / "absent" / "s.png")]) == 2
    assert "absent/s.png' cannot be read or written (No such file or directory)" in capsys.readouterr().err


def test_each_commands_help_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (
        (["gc"], "Delete what no commit holds, as killed processes leave it."),
        (["study", "tokens"], "Issue tokens for new raters;"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*words, "--help"])
        assert says in " ".join(capsys.readouterr().out.split())


def test_the_package_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "rayproj", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == f"rayproj {__version__}\n", done.stderr
