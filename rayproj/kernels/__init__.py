"""The Triton kernels and their references, which live in the top-level folder `kernels/` of the checkout.

That folder has no `__init__.py`: a top-level package of that name would shadow the PyPI package `kernels`, which
transformers and diffusers import. The wheel puts the files beside this one.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2] / "kernels"
if _checkout.is_dir():
    __path__.append(str(_checkout))
