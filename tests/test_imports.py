"""Imports point one way, the engine and everything below it knows no Ray, and `kernels` is never ours."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [
    {"kernels", "storage", "config", "errors", "faults", "keyed", "web"},
    {"data"},
    {"engine"},
    {"obfuscation"},
    {"diffusion", "privacy", "classifiers", "robustness", "evaluation"},
    {"synthesis", "curation", "discovery", "judging", "preferences", "responsibility"},
]
BELOW_RAY = LAYERS[0] | LAYERS[1] | LAYERS[2]
KNOW_NO_LOSS = {"runtime", "tracking"}
TOP = {"jobs", "benchmarks", "chain", "sweep", "cli", "__main__", "report", "export", "planning", "maintenance"}
MODULES = sorted((ROOT / "rayproj").rglob("*.py")) + sorted((ROOT / "kernels").glob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return "kernels" if relative.parts[0] == "kernels" else relative.with_suffix("").parts[1]


def rooms_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports_of(path) if name.startswith("rayproj.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    layer = next((i for i, rooms in enumerate(LAYERS) if room in rooms), None)
    if layer is not None:
        above = set().union(*LAYERS[layer + 1 :], KNOW_NO_LOSS, TOP)
        assert not rooms_imported(path) & above
    if room in BELOW_RAY:
        assert not {name for name in imports_of(path) if name.split(".")[0] == "ray"}
    if room in KNOW_NO_LOSS:
        assert not rooms_imported(path) & (LAYERS[3] | LAYERS[4] | LAYERS[5] | {"jobs"})


def test_every_room_is_in_the_rules() -> None:
    known = set().union(*LAYERS, KNOW_NO_LOSS, TOP, {"__init__"})
    assert {room_of(path) for path in MODULES} <= known


def test_the_engine_runs_without_ray_being_importable() -> None:
    code = "import sys; sys.modules['ray'] = None; import rayproj.engine.training, rayproj.data.loader"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_ranks_and_makers_do_not_load_what_they_do_not_use() -> None:
    """They start often; SciPy's parts, which `import scipy` loads where first used, would be half a second of each."""
    heavy = ("scipy.stats", "scipy.signal", "scipy.ndimage", "scipy.optimize", "transformers", "diffusers", "deepspeed")
    jobs = ("train_autoencoder", "train_classifier", "train_diffusion", "finetune_private", "evaluate", "audit_privacy")
    makers = ("synthesis.synthesizer", "synthesis.upscaler", "robustness.job", "robustness.mixing", "discovery.examine")
    names = [*(f"jobs.{job}" for job in jobs), *makers, "diffusion.encode", "obfuscation.writing"]
    code = f"import sys, {', '.join(f'rayproj.{name}' for name in names)}; print({{*{heavy}}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_the_folder_kernels_shadows_no_package(tmp_path: Path) -> None:
    """transformers and diffusers import the PyPI package `kernels`; a regular package always wins over our folder."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("owner = 'another project'\n")
    code = (
        "import sys; sys.path += [sys.argv[1]]\n"
        "import kernels, rayproj.kernels.philox\n"
        "assert kernels.owner == 'another project'\n"
        "assert rayproj.kernels.philox.philox4x32\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)
