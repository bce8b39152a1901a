"""A raylet on a spot instance, which drains when the cloud is about to take the instance.

python cluster/spot.py aws|gcp OPTIONS-OF-RAY-START ...

Ray has no watcher of spot notices, but it drains a node whose `ray start --block` gets SIGTERM: no new ranks come, and
rayproj's commit and move. So the notice is turned into that signal. METADATA_URL stands for the cloud's in tests.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from urllib.error import URLError

SECONDS_LEFT = {"aws": 110, "gcp": 25}  # of the 120 and 30 that the clouds give
URL = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}


def noticed(cloud: str) -> bool:
    """Whether this instance is to be taken; False too if nobody answers."""
    url = os.environ.get("METADATA_URL", URL[cloud])
    try:
        if cloud == "gcp":
            return _get(f"{url}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}) == "TRUE"
        token = _get(f"{url}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
        # 404, an error here, until there is a notice.
        return bool(_get(f"{url}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}))
    except (URLError, TimeoutError):
        return False


def _get(url: str, headers: dict[str, str], method: str = "GET") -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=2) as answer:
        return str(answer.read().decode())


def main(cloud: str, *options: str) -> int:
    if noticed(cloud):  # the autoscaler starts Ray again on a node that drained and is still there
        print("This instance is to be taken; Ray is not started.", flush=True)
        return 0
    os.environ.setdefault("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", str(SECONDS_LEFT[cloud]))
    raylet = subprocess.Popen(["ray", "start", "--block", *options])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: raylet.terminate())
    told = False
    while raylet.poll() is None:
        if not told and noticed(cloud):
            print("Notice: this instance is to be taken; draining.", flush=True)
            raylet.terminate()
            told = True
        time.sleep(2)
    return raylet.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
