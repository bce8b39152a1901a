"""Where real images come from. A source is an iterator of samples with the names of its classes."""

from rayproj.data.sources.base import Source, SourceConfig, SourceKind, Uncertain, open_source, pixels

__all__ = ["Source", "SourceConfig", "SourceKind", "Uncertain", "open_source", "pixels"]
