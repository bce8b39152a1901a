"""Metrics of classifiers and of synthetic images."""
