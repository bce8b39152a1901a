"""Show a trained diffusion model to people on a page, and to programs as JSON: policy, filter, watermark, provenance.
With `load` it measures itself and is done, as a stage of a chain.

python jobs/serve_playground.py configs/serve_playground.yaml key=value ...
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from rayproj.errors import Interrupted
from rayproj.report.pages import rendered
from rayproj.responsibility.load import LoadConfig, carry_out
from rayproj.responsibility.playground import PlaygroundConfig, offer_of, planned
from rayproj.runtime import interrupt
from rayproj.runtime.command import command
from rayproj.runtime.run import Run, RunConfig
from rayproj.runtime.serving import serving
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
        wanted = config.playground
        header, offer = planned(wanted), offer_of(wanted.model)
        page = rendered("playground.html", config=wanted, offer=offer, provenance=header.provenance, name=header.name)

        def build() -> Any:
            from rayproj.responsibility.serving import bound  # needs the extra serve

            return bound(wanted, header, offer, page, run.store.uri)

        with serving(run.id, {"host": wanted.host, "port": wanted.port}, build):
            say(f"The playground is at http://{wanted.host}:{wanted.port}/; Ctrl-C ends it.")
            if config.load.users:
                load = carry_out(config.load, f"http://127.0.0.1:{wanted.port}")
                say(str(load))
                return run.finish({"load": load.described()})
            while True:  # until somebody ends it
                interrupt.check()
                if run.stop_wished():
                    raise Interrupted
                time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
