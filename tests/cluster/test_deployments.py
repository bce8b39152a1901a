"""The files of cluster/ against what reads them: Ray's own loader and options, KubeRay's fields, a mocked AWS, bash."""

import copy
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from ray.autoscaler._private import util
from ray.scripts.scripts import start
from rayproj.jobs.train_diffusion import Config

from rayproj import config as configuration
from rayproj.tracking.prometheus import GAUGES, RESTARTS
from tests.support.commands import ROOT

CLUSTER = ROOT / "cluster"
IMAGE_FOLDER = "/opt/rayproj"  # the checkout in the image


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def ray_start_options(words: list[str]) -> dict[str, Any]:
    """The words as `ray start` reads them; unknown ones are an error."""
    options, rest, _ = start.make_parser(click.Context(start)).parse_args(list(words))
    assert not rest, rest
    return options


# --- ray up ---


@pytest.fixture(params=["aws", "gcp"])
def cloud(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    config = util.prepare_config(read(f"{request.param}.yaml"))
    util.validate_config(config)
    return request.param, config


def test_ray_takes_the_configs_of_the_clouds(cloud: tuple[str, dict[str, Any]]) -> None:
    name, config = cloud
    head, gpu = config["available_node_types"][config["head_node_type"]], config["available_node_types"]["gpu"]
    assert head["resources"] == {"CPU": 0} and head["max_workers"] == 0
    assert 0 <= gpu["min_workers"] <= gpu["max_workers"] <= config["max_workers"] and config["idle_timeout_minutes"] > 0
    if name == "aws":
        assert gpu["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert "InstanceMarketOptions" not in head["node_config"]
    else:
        assert gpu["node_config"]["scheduling"]["provisioningModel"] == "SPOT" and gpu["resources"]["GPU"] > 0
        assert "scheduling" not in head["node_config"]
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


def test_a_misspelt_field_is_caught_by_ray() -> None:
    config = read("aws.yaml")
    config["idle_timeout_minuts"] = config.pop("idle_timeout_minutes")
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
        util.validate_config(util.prepare_config(config))


def test_start_commands(cloud: tuple[str, dict[str, Any]]) -> None:
    name, config = cloud
    stop, head = config["head_start_ray_commands"]
    assert stop == "ray stop" and head.startswith("ray start ")
    options = ray_start_options(shlex.split(head)[2:])
    assert options["head"] and options["num_cpus"] == "0" and options["dashboard_host"] == "127.0.0.1"
    assert options["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    stop, worker = config["worker_start_ray_commands"]
    words = shlex.split(worker.partition("<")[0])
    assert stop == "ray stop" and worker.endswith("&") and words[:2] == ["nohup", "python"]
    assert (CLUSTER / Path(words[2]).relative_to(f"{IMAGE_FOLDER}/cluster")).exists() and words[3] == name
    address = ray_start_options(words[4:])["address"]
    assert address == f"$RAY_HEAD_IP:{options['port']}"


def test_ray_launches_an_on_demand_head_and_spot_workers_on_aws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ray's own code for AWS, to where the machines would start."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

    (tmp_path / ".ssh").mkdir()  # Ray makes a key pair
    for name, value in {"HOME": str(tmp_path), "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}.items():
        monkeypatch.setenv(name, value)
    with mock_aws():
        iam = boto3.client("iam", "us-east-1")  # Ray waits 15 s after making them itself
        iam.create_instance_profile(InstanceProfileName="ray-autoscaler-v1")
        iam.create_role(RoleName="ray", AssumeRolePolicyDocument="{}")
        iam.add_role_to_instance_profile(InstanceProfileName="ray-autoscaler-v1", RoleName="ray")
        config = AWSNodeProvider.fillout_available_node_types_resources(util.prepare_config(read("aws.yaml")))
        config = bootstrap_aws(config)
        types = config["available_node_types"]
        assert types["head"]["resources"] == {"CPU": 0}
        assert types["gpu"]["resources"].items() >= {"CPU": 48, "GPU": 4}.items()
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for kind, name in (("head", "head"), ("worker", "gpu")):
            tags = {TAG_RAY_NODE_KIND: kind, TAG_RAY_USER_NODE_TYPE: name}
            provider.create_node(types[name]["node_config"], tags, 1)
        ec2 = boto3.client("ec2", config["provider"]["region"])
        machines = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
        lifecycles = {m["InstanceType"]: m.get("InstanceLifecycle") for m in machines}
        assert lifecycles == {"m6i.2xlarge": None, "g5.12xlarge": "spot"}
        named = [{"Name": "group-name", "Values": ["rayproj"]}]
        (group,) = ec2.describe_security_groups(Filters=named)["SecurityGroups"]
    to_the_world = [rule["FromPort"] for rule in group["IpPermissions"] if rule["IpRanges"]]
    assert to_the_world == [22], "nothing but ssh"


# --- KubeRay ---

FIELDS = jsonschema.Draft202012Validator(json.loads((ROOT / "tests" / "cluster" / "kuberay_schema.json").read_text()))


def problems(manifest: Any) -> list[str]:
    return [error.message for error in FIELDS.iter_errors(manifest)]


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


@pytest.fixture(params=["raycluster", "rayjob"])
def manifest(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read(f"kuberay/{request.param}.yaml")


def test_kuberay_knows_every_field(manifest: dict[str, Any]) -> None:
    assert problems(manifest) == []


@pytest.mark.parametrize(
    ("path", "right", "wrong"),
    [
        ((), "authOptions", "authOption"),
        (("workerGroupSpecs", 0), "maxReplicas", "maxReplica"),
        (("workerGroupSpecs", 0, "template", "spec"), "tolerations", "toleration"),
        (("headGroupSpec", "template", "spec", "containers", 0, "resources"), "limits", "limit"),
    ],
)
def test_a_misspelt_field_is_caught(manifest: dict[str, Any], path: tuple[Any, ...], right: str, wrong: str) -> None:
    place = cluster_spec(manifest)
    for key in path:
        place = place[key]
    place[wrong] = place.pop(right)
    assert any(f"'{wrong}' was unexpected" in text for text in problems(manifest))


@pytest.mark.parametrize(
    "change",
    [
        {"submissionMode": "K8sJob"},
        {"backoffLimit": "3"},
        {"shutdownAfterJobFinishes": False},  # ttlSecondsAfterFinished needs it
        {"deletionStrategy": {"deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}]}},
    ],
)
def test_values_that_kuberay_refuses_are_caught(change: dict[str, Any]) -> None:
    good = read("kuberay/rayjob.yaml")
    bad = copy.deepcopy(good)
    bad["spec"].update(change)
    assert problems(good) == [] and problems(bad)


def test_pods(manifest: dict[str, Any]) -> None:
    spec = cluster_spec(manifest)
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned and spec["rayVersion"] == pinned[1] and spec["authOptions"] == {"mode": "token"}
    head, (gpu,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    for group in (head, gpu):
        ray_start_options([f"--{name}={value}" for name, value in group["rayStartParams"].items()])
    assert head["rayStartParams"]["num-cpus"] == "0" and "serviceType" not in head  # a ClusterIP
    pod = gpu["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    tolerated = {toleration["key"] for toleration in pod["tolerations"]}
    assert {"nvidia.com/gpu", *pod["nodeSelector"]} <= tolerated, "spot nodes have a taint of the same name"
    drain = {entry["name"]: entry["value"] for entry in container["env"]}["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
    assert float(drain) < pod["terminationGracePeriodSeconds"], "killed before it has drained"
    assert gpu["minReplicas"] <= gpu["replicas"] <= gpu["maxReplicas"]


# --- what is run ---


def check_command(words: list[str]) -> Config:
    """Of `jobs/train_diffusion.py CONFIG key=value ...`: the files exist, and the config is right."""
    job, config, *overrides = [word.removeprefix(f"{IMAGE_FOLDER}/") for word in words]
    assert (ROOT / job).exists() and Path(job).name == "train_diffusion.py"
    return configuration.load(Config, ROOT / config, overrides)


def test_the_rayjob_runs_a_job_that_exists() -> None:
    spec = read("kuberay/rayjob.yaml")["spec"]
    python, *words = shlex.split(spec["entrypoint"])
    config = check_command(words)
    (gpu,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert python == "python" and config.cluster.ranks == gpu["replicas"] and config.cluster.gpus_per_rank == 1
    assert config.run.dir.startswith("s3://") and config.diffusion.latents.startswith("s3://")
    assert set(yaml.safe_load(spec["runtimeEnvYAML"])) == {"env_vars"}


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml", "kuberay/raycluster.yaml"])
def test_the_commands_of_the_comments_are_right(name: str) -> None:
    text = re.sub(r"\\\n# +", "", (CLUSTER / name).read_text())
    (line,) = re.findall(r"^# +rayproj submit (.+)$", text, re.MULTILINE)
    words, retries = shlex.split(line)[:-2], shlex.split(line)[-2:]
    assert check_command(words).run.dir.endswith("BUCKET/runs/one") and retries == ["--retries", "3"]


@pytest.mark.parametrize("script", ["local.sh", "slurm/submit.sbatch"])
def test_bash_takes_the_scripts(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(CLUSTER / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- the image ---


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (CLUSTER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_the_image_has_what_its_installation_reads() -> None:
    kinds = [kind for kind, _ in instructions()]
    assert kinds[0] == "FROM" and dict(instructions())["FROM"] == "python:3.11-slim" and "ENTRYPOINT" not in kinds
    assert kinds.index("USER") > max(i for i, kind in enumerate(kinds) if kind == "RUN"), (
        "installed as root, run as not"
    )
    assert dict(instructions())["WORKDIR"] == IMAGE_FOLDER and dict(instructions())["USER"] == "ray"
    copied: set[str] = set()
    for kind, rest in instructions():
        if kind == "COPY":
            *sources, target = rest.split()
            assert target == "./" or sources == [target], rest
            assert all((ROOT / source).exists() for source in sources), rest
            copied.update(sources)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", "cluster", project["project"]["readme"], *project["project"]["license-files"]}
    assert copied >= needed | set(wheel["packages"]) | set(wheel["force-include"])
    (pip,) = [shlex.split(rest) for kind, rest in instructions() if kind == "RUN" and rest.startswith("pip")]
    assert pip[pip.index("-c") + 1] in copied
    extras = re.search(r"\.\[(.+)\]", " ".join(pip))
    assert extras and extras[1] in project["project"]["optional-dependencies"]


# --- Grafana ---

DASHBOARD = json.loads((CLUSTER / "grafana.json").read_text())


def queries() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    exported = {f"ray_rayproj_{name}" for name in (*GAUGES, RESTARTS)}  # as a scrape has them: test_prometheus.py
    shown = {name for query in queries() for name in re.findall(r"\bray_\w+", query)}
    assert shown == exported
    assert all('{run=~"$run"}' in query for query in queries())


def test_the_dashboard_is_one_of_grafana() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    assert variables["run"]["query"]["query"] == "label_values(ray_rayproj_step, run)"
    places: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}" and panel["title"] and panel["targets"]
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters)
        for override in panel["fieldConfig"]["overrides"]:
            assert override["matcher"]["options"] in letters
        at = panel["gridPos"]
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not mine & places and at["x"] + at["w"] <= 24
        places |= mine
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
