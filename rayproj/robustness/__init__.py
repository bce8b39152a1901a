"""Robustness: attacks within ℓp balls, and what they say of a classifier."""
