"""Which kernels are used follows from what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rayproj.kernels import admission  # type: ignore[attr-defined]

MEASURED = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels.json"
UPDATE = "guidance + solver's update"  # as fast as a compiled one, and too small a part of a step to be called


def row(size: int, ours: float, eager: float, compiled: float, **more: Any) -> dict[str, Any]:
    said = {"kernel": "k", "dtype": "bfloat16", "mode": "forward", "shape": [size]}
    return {**said, "ours": ours, "eager": eager, "compiled": compiled, **more}


def test_the_table_is_what_the_kept_measurements_admit() -> None:
    found = admission.admitted(json.loads(MEASURED.read_text())["rows"])
    assert {key: least for key, least in found.items() if key[0] != UPDATE} == admission.ADMITTED


def test_a_kernel_must_beat_both_at_all_larger_sizes() -> None:
    fast, slow = row(8, 1.0, 2.0, 2.0), row(8, 1.0, 2.0, 0.9)
    assert admission.admitted([fast]) == {("k", "bfloat16"): 8}
    assert admission.admitted([slow]) == {} and admission.admitted([row(8, 1.0, 0.9, 2.0)]) == {}
    assert admission.admitted([row(2, 1, 2, 2), row(4, 1, 0.5, 2), row(8, 1, 2, 2)]) == {("k", "bfloat16"): 8}
    assert admission.admitted([row(4, 1, 2, 2), row(4, 1, 2, 0.5), row(8, 1, 2, 2)]) == {("k", "bfloat16"): 8}
    assert admission.admitted([row(8, 1, 2, 2, mode="training")]) == {}, "none is used in training"


class Activations:
    """A tensor on a GPU, as far as admission looks at it."""

    is_cuda, device, dtype = True, "cuda:0", torch.bfloat16

    def __init__(self, size: int, ndim: int = 3, contiguous: bool = True) -> None:
        self.size, self.ndim, self.contiguous = size, ndim, contiguous

    def numel(self) -> int:
        return self.size

    def is_contiguous(self) -> bool:
        return self.contiguous


def test_what_is_asked_of_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernel, least = "group norm + SiLU", admission.ADMITTED["group norm + SiLU", "bfloat16"]
    assert not admission.admits(kernel, Activations(least, 4)), "training"
    with torch.no_grad():
        assert admission.admits(kernel, Activations(least, 4))
        assert not admission.admits(kernel, Activations(least - 1, 4))
        assert not admission.admits(kernel, Activations(least, 4, contiguous=False)), "channels-last has another least"
        assert admission.admits(kernel, Activations(16 * 640 * 32 * 32, 4, contiguous=False))
        assert not admission.admits("another", Activations(least, 4))
        assert not admission.admits(kernel, torch.zeros(least, dtype=torch.bfloat16)), "on a CPU"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert not admission.admits(kernel, Activations(least, 4)), "another GPU than it was measured on"
