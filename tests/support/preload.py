"""What the server of tests.support.ranks imports before it forks."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
from rayproj.engine.engine import import_deepspeed
from rayproj.engine.world import World

import_deepspeed(World(0, 1, 0, "cpu"))
del os.environ["LOCAL_RANK"]
import torch._dynamo  # noqa: E402, F401  as an optimizer does
from diffusers import AutoencoderKL  # noqa: E402, F401  brings all of its models, which takes seconds

import tests.support.private  # noqa: E402
import tests.support.regression  # noqa: E402, F401
