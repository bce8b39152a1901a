"""Judge text-to-image models on a set of prompts: alignment, quality, whom they draw, what can be got out of them.

python jobs/judge.py configs/judge.yaml key=value ...
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rayproj.data.dataset import Dataset
from rayproj.discovery.captions import CaptionConfig, EmbedderConfig, index_header
from rayproj.evaluation.features import EfficientNetLite0Features
from rayproj.export.card import last_part
from rayproj.export.records import card
from rayproj.judging.judge import check, judge
from rayproj.judging.scoring import JudgeConfig, headers_of, planned
from rayproj.report import judged
from rayproj.runtime.command import command
from rayproj.runtime.producer import Pool, PoolConfig
from rayproj.runtime.run import Run, RunConfig
from rayproj.storage.store import Store, to_json
from rayproj.tracking.tracker import TrackingConfig


@dataclass
class Config:
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    run: RunConfig = field(default_factory=RunConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def main(config: Config) -> dict[str, Any]:
    with Run.open("judge", config) as run:
        if run.result:
            return run.result
        check(config.judge)
        for uri in config.judge.cards:
            card(uri)  # what cannot be written is said now, not after the work
        with Pool(run, config.pool) as pool:
            index = _index(pool, config)
            for name, header in headers_of(config.judge, index).items():
                scores = planned(config.judge, name, header)
                values = {"config": asdict(config.judge), "name": name, "index": index, "out": scores.uri}
                pool.produce(scores, "rayproj.judging.scoring:Scorer", values)
        found = judge(config.judge)
        store = Store(config.judge.out)
        store.write("judged.json", to_json(found))
        cards = {last_part(uri): card(uri, judged=(config.judge, found)) for uri in config.judge.cards}
        for name, text in cards.items():
            store.write(f"cards/{name}.md", text.encode())
        page = judged.page(found, judged.samples(config.judge), cards, judged.pairs(config.judge))
        store.write("judged.html", page.encode())
        if folder := store.local_path():
            run.tracker.event({"type": "file", "name": "judged", "path": str(folder / "judged.html")})
        return run.finish({"html": f"{store.uri}/judged.html", **found})


def _index(pool: Pool, config: Config) -> str:
    """The features and captions of the known images; "" where none are configured."""
    known = config.judge.alignment.known
    if not known:
        return ""
    of = CaptionConfig(images=known, field=config.judge.alignment.known_captions)
    embedder = EmbedderConfig(size=config.judge.feature_size)
    header = index_header(of, embedder, Dataset.open(known), EfficientNetLite0Features.dimensions)
    index = Dataset.create(f"{config.judge.out}/known", header)
    values = {"out": index.uri, "batch": config.judge.batch}
    pool.produce(index, "rayproj.discovery.captions:Indexer", values)
    return index.uri


if __name__ == "__main__":
    raise SystemExit(command(Config, main))
