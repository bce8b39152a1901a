"""The subset of Fashion-MNIST in the package: 1,000 training and 200 test images of each class."""

from __future__ import annotations

from pathlib import Path

import rayproj.data
from rayproj.data.sources.base import Source, SourceConfig
from rayproj.data.sources.idx import FASHION, idx_source

EMBEDDED = Path(rayproj.data.__path__[0]) / "embedded"


def open(config: SourceConfig) -> Source:
    return idx_source(
        config,
        EMBEDDED,
        "Fashion-MNIST (subset)",
        FASHION,
        licence="MIT",
        attribution="Fashion-MNIST, Zalando SE; Xiao, Rasul and Vollgraf 2017",
    )
