"""Classifiers: models and the training task."""

from rayproj.classifiers.model import load

__all__ = ["load"]
