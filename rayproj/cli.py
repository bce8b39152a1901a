"""The `rayproj` command: demo, chain, sweep, submit, plan, status, logs, stop, resume, privacy, export, card, provenance,
playground, dataset, grid, gallery, evaluate, study, verify, gc, doctor."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from rayproj import __version__
from rayproj.config import shipped
from rayproj.errors import UserError
from rayproj.storage.store import Store


class _Commands(argparse._SubParsersAction):  # type: ignore[type-arg]
    """Each command's own --help begins with what the list of commands says of it."""

    def add_parser(self, name: str, **options: Any) -> Any:
        says = options["help"]
        return super().add_parser(name, description=f"{says[0].upper()}{says[1:]}.", **options)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("action", "parsers", _Commands)


def _from(least: int, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """The type of an option that is a number, and no less than one."""

    def number(text: str) -> float:
        with suppress(ValueError):
            if (value := kind(text)) >= least:
                return value
        raise argparse.ArgumentTypeError(f"'{text}' is no {'whole ' * (kind is int)}number from {least} on")

    return number


def main(argv: list[str] | None = None) -> int:
    parser = _Parser(prog="rayproj", description="Synthetic vision data that can be trusted.")
    parser.add_argument("--version", action="version", version=f"rayproj {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_chains(commands)
    _add_runs(commands)
    _add_privacy(commands)
    _add_data(commands)
    _add_evaluate(commands)
    _add_study(commands)
    _add_responsibility(commands)
    _add_upkeep(commands)
    arguments, rest = parser.parse_known_args(argv)
    # argparse leaves words that stand behind an option; they can only be overrides.
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    try:
        return _run(arguments)
    except BrokenPipeError:  # as `| head` leaves it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:  # of no file: such as a connection's
            raise
        where = f"'{error.filename}'" if error.filename is not None else "A file"
        print(f"error: {where} cannot be read or written ({error.strerror}); give another path.", file=sys.stderr)
        return 2


def _add_chains(commands: Any) -> None:
    """The options of `rayproj demo`, `chain` and `sweep`."""
    demo = commands.add_parser("demo", help="the whole chain in small, on this machine or on RAY_ADDRESS's cluster")
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of configs/demo.yaml")
    chain = commands.add_parser("chain", help="the jobs that a file names, one after the other, as the demo's")
    chain.add_argument("config", help="a YAML file with 'stages:', such as configs/demo.yaml")
    chain.add_argument("overrides", nargs="*", metavar="key=value")
    sweep = commands.add_parser("sweep", help="a grid of overrides over a job or chain; again goes on with it")
    sweep.add_argument("config", help="a YAML file, such as configs/sweep.yaml")
    sweep.add_argument("overrides", nargs="*", metavar="key=value")


def _add_runs(commands: Any) -> None:
    """The options of `rayproj submit`, `plan`, `status`, `logs`, `stop` and `resume`."""
    submit = commands.add_parser("submit", help="submit a job to a Ray cluster")
    submit.add_argument("job", help="a script, such as jobs/train_diffusion.py")
    submit.add_argument("config", help="a YAML file below the current folder")
    submit.add_argument("overrides", nargs="*", metavar="key=value")
    submit.add_argument("--address", default=None, help="http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS)")
    submit.add_argument("--follow", action="store_true", help="stream the log and exit as the job does")
    submit.add_argument(
        "--retries", type=_from(0), default=0, metavar="N", help="follow, and send it again if it is lost"
    )
    submit.add_argument("--dry-run", action="store_true", help="say what would be sent, and send nothing")
    plan = commands.add_parser("plan", help="what a job would need and do, without starting anything")
    plan.add_argument("job", help="a script, such as jobs/train_diffusion.py, or its name, or chain")
    plan.add_argument("config", help="a YAML file")
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.add_argument("--samples", type=_from(0), default=0, metavar="N", help="of an input that is not there yet")
    plan.add_argument("--shape", default="", metavar="CxHxW", help="of its images or latents, such as 4x8x8")
    plan.add_argument("--classes", type=_from(0), default=0, metavar="N", help="of it")
    plan.add_argument(
        "--text", default="24x384", metavar="TxD", help="tokens and dimension of its captions' embeddings"
    )
    plan.add_argument("--json", action="store_true", help="the same for programs, sizes in bytes")
    status = commands.add_parser("status", help="the runs below a folder")
    status.add_argument("root", nargs="?", default="runs")
    logs = commands.add_parser("logs", help="what a run has said, on whatever machine")
    logs.add_argument("run", metavar="RUN", help="a run dir")
    logs.add_argument("--follow", action="store_true", help="go on until the run ends")
    stop = commands.add_parser("stop", help="ask a run, on whatever machine, to commit and stop")
    stop.add_argument("run", metavar="RUN", help="a run dir")
    resume = commands.add_parser("resume", help="go on with a run, here or on RAY_ADDRESS's cluster")
    resume.add_argument("run", metavar="RUN", help="a run dir")
    resume.add_argument("overrides", nargs="*", metavar="key=value", help="of where and how it runs")


def _add_privacy(commands: Any) -> None:
    """The options of `rayproj privacy`."""
    privacy = commands.add_parser("privacy", help="what private runs have spent, and the budgets of private datasets")
    questions = privacy.add_subparsers(dest="question", required=True, metavar="QUESTION")
    show = questions.add_parser("show", help="what runs have spent, and what is left of their datasets' budgets")
    show.add_argument("runs", nargs="+", metavar="RUN", help="a run dir of jobs/finetune_private.py")
    budget = questions.add_parser("budget", help="what all private runs on a dataset may spend together")
    budget.add_argument("dataset", metavar="DATASET_URI", help="the private latents")
    budget.add_argument("--epsilon", type=float, metavar="E", help="set it, once and for all; without: show it")
    budget.add_argument("--delta", type=float, metavar="D", help="less than one over the number of examples")
    close = questions.add_parser("close", help="give back what a run has planned and will not do; it can never go on")
    close.add_argument("run", metavar="RUN", help="a run dir of jobs/finetune_private.py")


def _add_data(commands: Any) -> None:
    """The options of `rayproj export`, `dataset`, `grid` and `gallery`."""
    export = commands.add_parser("export", help="the model of a run, with a model card, in formats that others read")
    export.add_argument("run", metavar="RUN", help="run dir of a training job")
    export.add_argument("--to", required=True, metavar="DIR", help="a folder that is not there yet")
    dataset = commands.add_parser("dataset", help="what a dataset holds, and tars of others as one")
    questions = dataset.add_subparsers(dest="question", required=True, metavar="QUESTION")
    show = questions.add_parser("show", help="counts, classes, attributes, where it comes from, what it guarantees")
    show.add_argument("uri", metavar="URI", help="a dataset")
    show.add_argument("--sheet", metavar="FILE", help="write a PNG file with some images of each class")
    show.add_argument(
        "--per-class", type=_from(1), default=8, metavar="N", help="images of a class (default: %(default)d)"
    )
    show.add_argument(
        "--beside", action="append", default=[], metavar="URI", help="the same samples of another dataset"
    )
    index = questions.add_parser("index", help="make the webdataset tars of a folder a dataset, where they lie")
    index.add_argument("uri", metavar="URI", help="a folder of tars")
    index.add_argument("--label", default="label", metavar="KEY", help="of the JSON, if there is no cls member")
    index.add_argument("--skip", action="store_true", help="leave out what is broken, with a record, and go on")
    grid = commands.add_parser("grid", help="a picture of a synthetic dataset, by prompt or class and by properties")
    grid.add_argument("dataset", metavar="DATASET_URI", help="what jobs/generate.py wrote")
    grid.add_argument("file", metavar="FILE", help="a PNG file")
    grid.add_argument(
        "--per-cell", type=_from(1), default=4, metavar="N", help="images of one kind at most (default: %(default)d)"
    )
    gallery = commands.add_parser("gallery", help="a page that shows each obfuscation at several draws")
    gallery.add_argument("images", metavar="URI", help="a dataset, or a folder of images of ImageNet")
    gallery.add_argument("file", metavar="FILE", help="an HTML file")
    gallery.add_argument(
        "--draws", type=_from(1), default=6, metavar="N", help="pictures of each (default: %(default)d)"
    )
    gallery.add_argument("--photos", default="", metavar="URI", help="a dataset of other pictures to compose with")
    gallery.add_argument("--learned", default="", metavar="RUN", help="run dir of jobs/learn_obfuscations.py")
    gallery.add_argument(
        "--names", nargs="+", default=["all"], metavar="NAME", help="of them, sets, or your own as package.module:Class"
    )


def _add_evaluate(commands: Any) -> None:
    """The options of `rayproj evaluate`."""
    evaluate = commands.add_parser("evaluate", help="judge a model by a table of its predictions")
    questions = evaluate.add_subparsers(dest="question", required=True, metavar="QUESTION")
    skew = questions.add_parser(
        "skewsize", help="bias: how the mistakes of each class depend on groups, and how unevenly"
    )
    skew.add_argument("table", metavar="FILE", help="a .parquet, .csv or .jsonl file with a row for each example")
    skew.add_argument("--prediction", required=True, metavar="COLUMN")
    skew.add_argument("--label", required=True, metavar="COLUMN")
    skew.add_argument(
        "--group", required=True, action="append", metavar="COLUMN", help="again for more, and their intersections"
    )
    skew.add_argument(
        "--together",
        type=_from(1),
        default=2,
        metavar="N",
        help="groups of an intersection, at most (default: %(default)d)",
    )
    skew.add_argument("--by", default="", metavar="COLUMN", help="such as that of several models: one for each value")
    skew.add_argument(
        "--words", action="store_true", help="predictions are free texts, which may be a class in other words"
    )
    skew.add_argument("--synonyms", default="", metavar="FILE", help="JSON of texts and the classes that they mean")
    skew.add_argument(
        "--embedder",
        default="",
        metavar="FOLDER",
        help="a text model of transformers: other texts are the nearest class",
    )
    skew.add_argument(
        "--vocabulary", type=_from(0), default=0, metavar="N", help="predictions but for the N commonest are one"
    )
    skew.add_argument(
        "--rare", type=_from(0), default=0, metavar="N", help="predictions of a class rarer than N are one"
    )
    skew.add_argument("--plain", action="store_true", help="Cramér's V without the correction of its bias")
    skew.add_argument(
        "--min-examples", type=_from(0), default=10, metavar="N", help="of a class (default: %(default)d)"
    )
    skew.add_argument(
        "--permutations", type=_from(0), default=1000, metavar="N", help="for chance (default: %(default)d)"
    )
    skew.add_argument(
        "--bootstraps", type=_from(0), default=1000, metavar="N", help="for intervals (default: %(default)d)"
    )
    skew.add_argument("--top", type=_from(0), default=5, metavar="N", help="classes to explain (default: %(default)d)")
    skew.add_argument("--out", metavar="FILE", help="keep all of it as JSON")
    skew.add_argument("--picture", metavar="FILE", help="a PNG file: effect sizes beside accuracy and gap")
    skew.add_argument("--residuals", metavar="FILE", help="a PNG file: the tables of the classes that drive the value")


def _add_study(commands: Any) -> None:
    """The options of `rayproj study`."""
    study = commands.add_parser("study", help="raters, ratings and results of side-by-side studies")
    questions = study.add_subparsers(dest="question", required=True, metavar="QUESTION")
    tokens = questions.add_parser(
        "tokens", help="issue tokens for new raters; they are shown once, and only hashes kept"
    )
    tokens.add_argument("run", metavar="RUN", help="run dir of jobs/serve_study.py")
    tokens.add_argument("--raters", type=int, required=True, metavar="N")
    tokens.add_argument("--address", default="", metavar="URL", help="of the study as raters see it: prints links")
    export = questions.add_parser("export", help="every rating, as a parquet file")
    export.add_argument("runs", nargs="+", metavar="RUN", help="run dirs of jobs/serve_study.py")
    export.add_argument("--to", required=True, metavar="FILE")
    report = questions.add_parser("report", help="what the ratings say so far, of one study or several together")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run dirs of jobs/serve_study.py")
    report.add_argument("--to", required=True, metavar="DIR", help="where the page, its numbers and the ratings go")
    report.add_argument("--bootstraps", type=_from(1), default=1000, metavar="N", help="(default: %(default)d)")
    add = questions.add_parser(
        "add", help="whom a new model is to meet next: the best, then four better and four worse"
    )
    add.add_argument("model", metavar="MODEL", help="its name in the studies that it has a part in, or is to have")
    add.add_argument("runs", nargs="+", metavar="RUN", help="the studies so far")


def _add_responsibility(commands: Any) -> None:
    """The options of `rayproj card`, `provenance` and `playground`."""
    card = commands.add_parser("card", help="the model card of a run, or the data card of a dataset, from its records")
    card.add_argument("uri", metavar="URI", help="run dir of a training job, or a dataset")
    card.add_argument("--to", required=True, metavar="FILE", help="a Markdown file that is not there yet")
    card.add_argument(
        "--evaluation", action="append", default=[], metavar="RUN", help="run dir of jobs/evaluate.py; again for more"
    )
    provenance = commands.add_parser("provenance", help="who signed for images and datasets, and whether they changed")
    questions = provenance.add_subparsers(dest="question", required=True, metavar="QUESTION")
    keys = questions.add_parser("keys", help="a key with a certificate that nobody trusts, to try it with")
    keys.add_argument("folder", metavar="DIR")
    check = questions.add_parser("check", help="exit code 2 where one is not as it was signed")
    check.add_argument("files", nargs="+", metavar="FILE", help="an image, or the URI of a dataset")
    check.add_argument("--trust", default="", metavar="PEM", help="certificates of those who are trusted")
    playground = commands.add_parser("playground", help="load on a playground (jobs/serve_playground.py)")
    questions = playground.add_subparsers(dest="question", required=True, metavar="QUESTION")
    load = questions.add_parser("load", help="latencies and images a second under users who ask again and again")
    load.add_argument("url", metavar="URL", help="such as http://127.0.0.1:8000, on this machine")
    load.add_argument("--users", type=int, default=4, metavar="N", help="(default: %(default)d)")
    load.add_argument("--seconds", type=float, default=10.0, metavar="S", help="(default: %(default)g)")
    load.add_argument("--prompt", default="", metavar="TEXT", help="of every request")
    load.add_argument("--to", default="", metavar="FILE", help="keep it as JSON, as for judge.playground.loads")


def _add_upkeep(commands: Any) -> None:
    """The options of `rayproj verify`, `gc` and `doctor`."""
    verify = commands.add_parser("verify", help="read and hash every file of the checkpoints and datasets of a folder")
    verify.add_argument("uri", metavar="URI", help="a run, a dataset, or a folder of them")
    gc = commands.add_parser("gc", help="delete what no commit holds, as killed processes leave it")
    gc.add_argument("uri", metavar="URI", help="a run, a dataset, or a folder of them")
    gc.add_argument("--older-than", type=_from(0, float), default=24.0, metavar="HOURS", help="(default: %(default)g)")
    gc.add_argument("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")
    doctor = commands.add_parser("doctor", help="whether this machine is fit, and what to do where it is not")
    doctor.add_argument("uri", nargs="?", metavar="URI", help="where runs are to be kept; by default this folder")


def _responsibility(arguments: argparse.Namespace) -> int:
    if arguments.command == "card":
        from rayproj.export.records import write_card

        print(write_card(arguments.uri, arguments.to, arguments.evaluation))
        return 0
    if arguments.command == "playground":
        from rayproj.responsibility.load import measure

        body = {"prompt": arguments.prompt} if arguments.prompt else {}
        print(load := measure(arguments.url, arguments.users, arguments.seconds, body))
        if arguments.to:
            load.write(arguments.to)
        return 0
    from rayproj.responsibility import provenance

    if arguments.question == "keys":
        for file in provenance.write_keys(arguments.folder):
            print(file)
        return 0
    verdicts = [provenance.check(file, arguments.trust) for file in arguments.files]
    print("\n".join(map(str, verdicts)))
    return 0 if all(verdict.sound for verdict in verdicts) else 2


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command in ("card", "provenance", "playground"):
        return _responsibility(arguments)
    if arguments.command == "demo":
        print("rayproj demo: real images in, private synthetic images, classifiers and a report out.", file=sys.stderr)
        return run_chain(shipped("demo.yaml"), arguments.overrides)
    if arguments.command == "chain":
        return run_chain(Path(arguments.config), arguments.overrides)
    if arguments.command == "sweep":
        return run_sweep(Path(arguments.config), arguments.overrides)
    if arguments.command == "submit":
        return run_submit(arguments)
    if arguments.command == "plan":
        return run_plan(arguments)
    if arguments.command == "status":
        from rayproj.runtime.status import print_status

        return print_status(arguments.root)
    if arguments.command == "logs":
        from rayproj.runtime.logs import print_logs

        return print_logs(arguments.run, arguments.follow)
    if arguments.command == "stop":
        from rayproj.runtime.run import wish_stop

        print(wish_stop(arguments.run))
        return 0
    if arguments.command == "resume":
        return run_resume(arguments.run, arguments.overrides)
    if arguments.command == "privacy":
        return run_privacy(arguments)
    if arguments.command == "dataset":
        return run_dataset(arguments)
    if arguments.command == "export":
        from rayproj.export import export

        print(export(arguments.run, arguments.to))
        return 0
    if arguments.command == "grid":
        from rayproj.report.grid import write_grid

        print(write_grid(arguments.dataset, arguments.file, arguments.per_cell))
        return 0
    if arguments.command == "gallery":
        from rayproj.report.obfuscations import write_gallery

        given = (arguments.draws, arguments.photos, arguments.learned, arguments.names)
        print(write_gallery(arguments.images, arguments.file, *given))
        return 0
    if arguments.command == "evaluate":
        from rayproj.report import skewsize

        return skewsize.run(arguments)
    if arguments.command == "study":
        return run_study(arguments)
    if arguments.command == "verify":
        from rayproj.maintenance import print_verified

        return print_verified(arguments.uri)
    if arguments.command == "gc":
        from rayproj.maintenance import print_garbage

        return print_garbage(arguments.uri, arguments.older_than, arguments.dry_run)
    from rayproj.runtime.doctor import print_checks

    return print_checks(arguments.uri or ".")


def run_chain(path: Path, overrides: list[str]) -> int:
    """The jobs of a chain."""
    from rayproj import chain
    from rayproj.runtime.command import run_guarded
    from rayproj.tracking.progress import say

    def main(config: chain.Config) -> dict[str, object]:
        result = chain.main(config)
        if "html" in result:
            say(f"The report: {result['html']}")
        return result

    return run_guarded(lambda: chain.load(path, overrides), main)


def run_sweep(path: Path, overrides: list[str]) -> int:
    """The points of a sweep."""
    from rayproj import config
    from rayproj.jobs import sweep  # type: ignore[attr-defined]
    from rayproj.runtime.command import run_guarded

    return run_guarded(lambda: config.load(sweep.Config, path, overrides), sweep.main)


def run_submit(arguments: argparse.Namespace) -> int:
    """A job of the project's is sent with a config that it takes; what another script takes, only it knows."""
    from rayproj import chain, config
    from rayproj.runtime import submit

    script, values = Path(arguments.job).resolve(), dict[str, Any]()
    if script.stem in chain.jobs():
        module = import_module(f"rayproj.jobs.{script.stem}")
        if hasattr(module, "Config") and script == Path(str(module.__file__)).resolve():
            values = config.to_dict(config.load(module.Config, arguments.config, arguments.overrides))
    request = submit.Request(arguments.job, arguments.config, arguments.overrides, Path.cwd(), values)
    if arguments.dry_run:
        print(submit.describe(request))
        return 0
    return submit.submit(request, arguments.address, arguments.follow, arguments.retries)


def run_plan(arguments: argparse.Namespace) -> int:
    """What a job would need, with what the command line says of inputs that are not there yet."""
    from rayproj import planning

    shape = arguments.shape.split("x") if arguments.shape else []
    if arguments.shape and (len(shape) != 3 or not all(side.isdigit() and int(side) for side in shape)):
        raise UserError(f"--shape={arguments.shape} is not a shape; write CxHxW, such as 4x8x8.")
    text = arguments.text.split("x")
    if len(text) != 2 or not all(side.isdigit() and int(side) for side in text):
        raise UserError(f"--text={arguments.text} is not a shape; write TxD, such as 77x768.")
    assumed = planning.Assumed(
        arguments.samples, tuple(map(int, shape)), arguments.classes, (int(text[0]), int(text[1]))
    )
    return planning.print_plans(arguments.job, arguments.config, arguments.overrides, assumed, arguments.json)


def run_dataset(arguments: argparse.Namespace) -> int:
    if arguments.question == "index":
        from rayproj.data.indexing import index

        found = index(arguments.uri, arguments.label, arguments.skip)
        left_out = "".join(f"; left out: {count} ({reason})" for reason, count in found["left_out"].items())
        print(f"{found['samples']} samples in {found['shards']} tars, of {', '.join(found['fields'])}{left_out}")
        return 0
    from rayproj.report.dataset import describe, write_beside, write_sheet

    print(describe(arguments.uri))
    if arguments.sheet and arguments.beside:
        print(write_beside([arguments.uri, *arguments.beside], arguments.sheet))
    elif arguments.sheet:
        print(write_sheet(arguments.uri, arguments.sheet, arguments.per_class))
    return 0


def run_study(arguments: argparse.Namespace) -> int:
    """Tokens, ratings and results of studies."""
    from rayproj.preferences import results, tokens
    from rayproj.preferences.plan import open_plan

    if arguments.question == "tokens":
        store = Store(arguments.run)
        open_plan(store)
        link = f"{arguments.address.rstrip('/')}/#token=" if arguments.address else ""
        for token in tokens.issue(store, arguments.raters):
            print(link + token)
        return 0
    if arguments.question == "export":
        rows = results.together(arguments.runs)
        Path(arguments.to).write_bytes(results.parquet(rows))
        print(f"{len(rows)} ratings, of which {sum(row['counts'] for row in rows)} count, in {arguments.to}")
        return 0
    if arguments.question == "report":
        from rayproj.report.preferences import write

        print(write(arguments.runs, arguments.to, arguments.bootstraps)["html"])
        return 0
    pairs = results.pairs_to_add(arguments.runs, arguments.model)
    text = ", ".join(f"[{', '.join(pair)}]" for pair in pairs)
    print(f"study.pairs=[{text}]" if pairs else f"'{arguments.model}' has met all whom it needs to.")
    return 0


def run_privacy(arguments: argparse.Namespace) -> int:
    """What was spent, or the budget of a dataset."""
    from rayproj.data.dataset import Dataset
    from rayproj.privacy import budget

    if arguments.question == "show":
        print(budget.show_runs(arguments.runs))
        return 0
    if arguments.question == "close":
        print(budget.show_budget(budget.close(arguments.run)))
        return 0
    if (arguments.epsilon is None) != (arguments.delta is None):
        raise UserError("A budget is an ε at a δ; give both --epsilon and --delta, or neither to see what is left.")
    if arguments.epsilon is not None:
        budget.set_budget(arguments.dataset, arguments.epsilon, arguments.delta)
    print(budget.show_budget(Dataset.open(arguments.dataset).store))
    return 0


def run_resume(run_dir: str, overrides: list[str]) -> int:
    """The job of a run, with the config that the run has."""
    from rayproj import config
    from rayproj.runtime.command import run_guarded
    from rayproj.runtime.run import job_of

    job = import_module(f"rayproj.jobs.{job_of(run_dir)}")
    with tempfile.TemporaryDirectory(prefix="rayproj-") as scratch:
        file = Path(scratch) / "config.yaml"
        file.write_bytes(Store(run_dir).read("config.yaml"))
        return run_guarded(lambda: config.load(job.Config, file, [*overrides, f"run.dir={run_dir}"]), job.main)


if __name__ == "__main__":
    raise SystemExit(main())
