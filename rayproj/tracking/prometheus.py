"""Metrics for Prometheus, by the exporter that every Ray node has; cluster/grafana.json shows them."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

GAUGES = {
    "step": "The last logged update, or shard",
    "loss": "Mean loss since the row before",
    "epsilon": "Privacy spent by all releases so far",
    "images_per_second": "Samples trained on or made, over all workers",
    "step_seconds": "Seconds of a step",
    "compute_seconds": "of it: forward and backward",
    "data_wait_seconds": "of it: waiting for data",
    "communication_seconds": "of it: collectives",
    "optimizer_seconds": "of it: the optimizer",
    "checkpoint_stall_seconds": "of it: copying the state for a checkpoint",
    "tflops_per_rank": "Model TFLOP/s of a rank",
    "mfu": "Share of the device's peak that the model's operations use",
    "goodput": "Share of the run's time that went into steps that counted",
    "ranks": "Ranks that train",
    "queue_busy": "Shards that are being made",
    "queue_waiting": "Shards that nobody has begun",
}
RESTARTS = "restarts_total"


class PrometheusSink:
    """Sets `ray_rayproj_<name>{run=, job=}`; without a running Ray there is nobody to export it, and nothing is done."""

    def __init__(self, run: str, job: str) -> None:
        # Ray's metrics are ASCII.
        self._tags = {"run": run.encode("ascii", "replace").decode(), "job": job}
        if not ray.is_initialized():
            self._gauges: dict[str, Gauge] = {}
            self._restarts = None
            return
        keys = ("run", "job")
        self._gauges = {name: Gauge(f"rayproj_{name}", about, tag_keys=keys) for name, about in GAUGES.items()}
        self._restarts = Counter(f"rayproj_{RESTARTS}", "Starts from the last commit", tag_keys=(*keys, "cause"))

    def set(self, row: dict[str, Any]) -> None:
        """Take the values of a row of metrics."""
        for name, gauge in self._gauges.items():
            if name in row:
                gauge.set(float(row[name]), tags=self._tags)

    def restart(self, cause: str) -> None:
        if self._restarts is not None:
            self._restarts.inc(tags={**self._tags, "cause": cause})
