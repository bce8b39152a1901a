"""The application of a study on Ray Serve."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayproj.config import below
from rayproj.web import name_problems, own


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
    def open(self) -> bool:
        """Whether raters' tokens and answers go over a network that others may read."""
        return not self.secure and not own(self.host)

    @property
    def address(self) -> str:
        return f"http{'s' if self.certificate else ''}://{self.host}:{self.port}/"

    @property
    def http(self) -> dict[str, Any]:
        """As of `ray.serve.config.HTTPOptions`."""
        tls = {"ssl_certfile": self.certificate, "ssl_keyfile": self.key} if self.certificate else {}
        return {"host": self.host, "port": self.port, **tls}


def bound(uri: str, config: ServeConfig) -> Any:
    """The application on the study of a run, for `serve.run`."""
    from ray import serve

    class Server:
        def __init__(self, uri: str, secure: bool, hosts: list[str]) -> None:
            self.uri, self.secure, self.hosts = uri, secure, hosts

        def __serve_build_asgi_app__(self) -> Any:
            from rayproj.preferences.app import application

            return application(self.uri, self.secure, self.hosts)

    deploy = serve.deployment(
        name="study", num_replicas=config.replicas, ray_actor_options={"num_cpus": config.cpus_per_replica}
    )
    return deploy(serve.ingress()(Server)).bind(uri, config.secure, [config.host, *config.hosts])
