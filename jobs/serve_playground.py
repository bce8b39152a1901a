"""Show a trained diffusion model to people on a page, and to programs as JSON: policy, filter, watermark, provenance.

python jobs/serve_playground.py configs/serve_playground.yaml key=value ...
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field
from typing import Any

from rayproj.errors import Interrupted, UserError
from rayproj.report.pages import rendered
from rayproj.responsibility.playground import PlaygroundConfig, offer_of, planned
from rayproj.runtime import interrupt
from rayproj.runtime.command import command
from rayproj.runtime.run import Run, RunConfig
from rayproj.tracking.progress import say
from rayproj.tracking.tracker import TrackingConfig

LOOK_SECONDS = 0.2


@dataclass
class Config:
    playground: PlaygroundConfig = field(default_factory=PlaygroundConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def main(config: Config) -> dict[str, Any]:
    with Run.open("serve_playground", config) as run:
        try:
            from rayproj.responsibility import serving
        except ImportError as error:
            raise UserError(f"The playground needs Ray Serve ({error}); pip install 'rayproj[serve]'.") from error
        wanted = config.playground
        header, offer = planned(wanted), offer_of(wanted.model)
        _need_port(wanted.host, wanted.port)
        page = rendered("playground.html", config=wanted, offer=offer, provenance=header.provenance, name=header.name)
        try:
            address = serving.start(wanted, header, offer, page, run.store.uri)
            say(f"The playground is at {address}/; Ctrl-C ends it.")
            while True:  # until somebody ends it
                interrupt.check()
                if run.stop_wished():
                    raise Interrupted
                time.sleep(LOOK_SECONDS)
        finally:
            serving.stop()


def _need_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"{host}:{port} cannot be listened to ({error}); set playground.port to another."
            ) from error


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
