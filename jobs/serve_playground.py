"""Show a trained diffusion model to people on a page, and to programs as JSON: policy, filter, watermark, provenance.
With `load` it measures itself and is done, as a stage of a chain.

python jobs/serve_playground.py configs/serve_playground.yaml key=value ...
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field
from typing import Any

from rayproj.errors import Interrupted, UserError
from rayproj.report.pages import rendered
from rayproj.responsibility.load import LoadConfig, carry_out
from rayproj.responsibility.playground import PlaygroundConfig, offer_of, planned
from rayproj.runtime import interrupt
from rayproj.runtime.command import command
from rayproj.runtime.run import Run, RunConfig
from rayproj.tracking.progress import say
from rayproj.tracking.tracker import TrackingConfig

LOOK_SECONDS = 0.2
LOOPBACK = ("127.0.0.1", "localhost", "0.0.0.0")  # where it is reached by its own machine


@dataclass
class Config:
    playground: PlaygroundConfig = field(default_factory=PlaygroundConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def problems(self) -> list[str]:
        if self.load.users and self.playground.host not in LOOPBACK:
            return [f"load.users is for a playground.host that this machine is: {' or '.join(LOOPBACK)}."]
        return []


def main(config: Config) -> dict[str, Any]:
    with Run.open("serve_playground", config) as run:
        if run.result:
            return run.result
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
            if config.load.users:
                load = carry_out(config.load, f"http://127.0.0.1:{wanted.port}")
                say(str(load))
                return run.finish({"load": load.described()})
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
