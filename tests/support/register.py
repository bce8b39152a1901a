"""A run that registers with a private dataset and ends: `python -m tests.support.register DATASET RUN`."""

import sys

from rayproj.privacy.budget import register
from rayproj.storage.store import Store
from tests.support import private

if __name__ == "__main__":
    register(Store(sys.argv[1]), Store(sys.argv[2]), private.mechanism(4))
