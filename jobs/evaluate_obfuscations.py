"""Measure classifiers under obfuscations as Stimberg et al. 2023 do: several at once, shard by shard, by a pool of makers.

python jobs/evaluate_obfuscations.py configs/evaluate_obfuscations.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rayproj.data.dataset import Dataset
from rayproj.evaluation.obfuscations import summary
from rayproj.evaluation.predicting import PredictConfig, header_of, result_of
from rayproj.runtime.command import command
from rayproj.runtime.producer import Pool, PoolConfig
from rayproj.runtime.run import Run, RunConfig
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    evaluate: PredictConfig = field(default_factory=PredictConfig)
    run: RunConfig = field(default_factory=RunConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def main(config: Config) -> dict[str, Any]:
    with Run.open("evaluate_obfuscations", config) as run:
        if run.result:
            return run.result
        with Pool(run, config.pool) as pool:
            for name in config.evaluate.models:
                predictions = Dataset.create(f"{config.evaluate.out}/{name}", header_of(config.evaluate, name))
                maker = {"config": asdict(config.evaluate), "model": name, "out": predictions.uri}
                pool.produce(predictions, "rayproj.evaluation.predicting:Predictor", maker)
        result = result_of(config.evaluate)
        rows = [[name, *summary(metrics).values()] for name, metrics in result["metrics"].items()]
        columns = ["model", *summary(next(iter(result["metrics"].values())))]
        run.tracker.event({"type": "table", "name": "obfuscations", "columns": columns, "rows": rows})
        return run.finish(result)


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
