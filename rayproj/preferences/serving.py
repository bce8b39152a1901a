"""The application of a study on Ray Serve."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rayproj.config import below
from rayproj.errors import UserError
from rayproj.web import name_problems


@dataclass
class ServeConfig:
    """Where raters come to."""

    host: str = "127.0.0.1"  # 0.0.0.0: whoever reaches this machine
    port: int = 8000
    # Its names, as a proxy before it has one; addresses and localhost hold too, and other names are refused.
    hosts: list[str] = field(default_factory=list)
    certificate: str = ""  # a file of a TLS certificate, with `key`; without one put a proxy that has one before it
    key: str = ""
    https: bool = False  # a proxy before it speaks https with raters; their cookie then goes by nothing else
    replicas: int = 1
    cpus_per_replica: float = 0.5

    def problems(self) -> list[str]:
        found = []
        if bool(self.certificate) != bool(self.key):
            found.append("serve.certificate and serve.key go together; give both or neither.")
        if self.replicas < 1 or not 0 < self.port < 65536:
            found.append("serve.replicas must be positive, and serve.port from 1 to 65535.")
        found += below(0, "serve", self, "cpus_per_replica")
        return found + name_problems(self.hosts, "serve.hosts")

    @property
    def secure(self) -> bool:
        return self.https or bool(self.certificate)

    @property
    def address(self) -> str:
        return f"http{'s' if self.certificate else ''}://{self.host}:{self.port}/"


@contextmanager
def serving(uri: str, name: str, config: ServeConfig) -> Iterator[str]:
    """Serve the study of a run while the block runs; gives its address.

    Raises:
        UserError: Ray Serve is not installed, or does not come up.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise UserError(f"The study needs Ray Serve: pip install 'rayproj[serve]' ({error}).") from error

    class Server:
        def __init__(self, uri: str, secure: bool, hosts: list[str]) -> None:
            self.uri, self.secure, self.hosts = uri, secure, hosts

        def __serve_build_asgi_app__(self) -> Any:
            from rayproj.preferences.app import application

            return application(self.uri, self.secure, self.hosts)

    http = {"host": config.host, "port": config.port}
    if config.certificate:
        http |= {"ssl_certfile": config.certificate, "ssl_keyfile": config.key}
    deploy = serve.deployment(
        name="study", num_replicas=config.replicas, ray_actor_options={"num_cpus": config.cpus_per_replica}
    )
    hosts = [config.host, *config.hosts]
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(http_options=http)
        serve.run(deploy(serve.ingress()(Server)).bind(uri, config.secure, hosts), name=name, route_prefix="/")
    except RuntimeError as error:
        why = str(error).strip().splitlines()[-1].rstrip(".)")  # above it is the proxy's traceback
        raise UserError(f"The study could not be served on {config.address}: {why}; is the port free?") from error
    try:
        yield config.address
    finally:
        serve.delete(name)  # and nothing else that the cluster serves
