"""Where real images come from. A source is an iterator of samples with the names of its classes."""

from rayproj.data.sources.base import Source, SourceConfig, SourceKind, open_source

__all__ = ["Source", "SourceConfig", "SourceKind", "open_source"]
