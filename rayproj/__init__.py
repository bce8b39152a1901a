"""Synthetic vision data that can be trusted: private latent diffusion, generation at scale, and the evidence."""

__version__ = "0.1.0"
