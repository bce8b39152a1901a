"""What only an object store gets wrong, on a real S3 server over HTTP that is disturbed on purpose."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from rayproj.errors import UserError
from rayproj.storage.store import Store
from tests.support.s3 import App, S3Server, answering, breaking

ROOT = Path(__file__).resolve().parents[2]


def ignoring_conditions(app: App) -> App:
    """As S3-compatible servers do that are older than conditional writes."""

    def disturbed(environ, start_response):  # type: ignore[no-untyped-def]
        environ.pop("HTTP_IF_NONE_MATCH", None)
        return app(environ, start_response)

    return disturbed


CREATOR = """
import json, sys
from rayproj.storage.store import Store
store, data = Store(sys.argv[1]), sys.argv[2].encode() * 50_000
assert store.exclusive
print(flush=True)
sys.stdin.readline()
print(json.dumps([name for name in map(str, range(25)) if store.put_once(name, data)]))
"""


def test_of_creators_in_many_processes_exactly_one_wins(server: S3Server, store: Store) -> None:
    with ExitStack() as stack:
        arguments = [sys.executable, "-c", CREATOR, store.uri]
        processes = {
            who: stack.enter_context(
                subprocess.Popen([*arguments, who], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            for who in "abc"
        }
        for process in processes.values():
            process.stdout.readline()  # all of them are ready
        for process in processes.values():
            process.stdin.write("\n")
            process.stdin.flush()
        won = {who: json.loads(process.stdout.readline()) for who, process in processes.items()}
    assert sorted(name for names in won.values() for name in names) == sorted(map(str, range(25)))
    client, bucket = server.client(), store.uri.split("/")[2]
    for who, names in won.items():
        for name in names:
            assert client.get_object(Bucket=bucket, Key=f"folder/{name}")["Body"].read() == who.encode() * 50_000


FORKING = """
import os, sys
from rayproj.storage.store import Store
store = Store(sys.argv[1])
assert store.put_once("parent", b"1")
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
else:
    assert not store.put_once("parent", b"2") and store.put_once("child", store.read("parent"))
    os._exit(0)
assert store.list() == ["child", "parent"]
"""


def test_a_store_survives_a_fork(store: Store) -> None:
    subprocess.run([sys.executable, "-c", FORKING, store.uri], cwd=ROOT, check=True, timeout=60)


def test_a_server_with_conditional_writes_is_recognised_and_left_clean(
    server: S3Server, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    assert store.exclusive
    assert caplog.records == []
    assert "Contents" not in server.client().list_objects_v2(Bucket=store.uri.split("/")[2])


@pytest.mark.parametrize(
    "disturbance",
    [
        ignoring_conditions,
        answering("501 Not Implemented", "NotImplemented", lambda environ: "HTTP_IF_NONE_MATCH" in environ),
    ],
)
def test_a_server_without_conditional_writes_gets_one_clear_warning_and_serves_one_writer(
    server: S3Server, store: Store, caplog: pytest.LogCaptureFixture, disturbance
) -> None:  # type: ignore[no-untyped-def]
    with server.disturbed(disturbance), caplog.at_level(logging.WARNING, "rayproj"):
        assert not store.exclusive
        assert store.put_once("a", b"first") and not store.put_once("a", b"second")
        assert store.at("below").put_once("b", b"1")
    assert store.read("a") == b"first" and store.list() == ["a", "below/b"]
    (record,) = caplog.records
    assert re.search("does not honour conditional writes.*safe only while one driver.*AWS S3", record.getMessage())


def first(count: int, status: str, code: str, method: str = "PUT"):  # type: ignore[no-untyped-def]
    """The first requests of a method are answered with an error."""
    left = iter(range(count))
    return answering(status, code, lambda environ: environ["REQUEST_METHOD"] == method and next(left, None) is not None)


DISTURBANCES = {
    "lost before": lambda: breaking(3),
    "answer lost": lambda: breaking(1, after=True),
    "answers lost again and again": lambda: breaking(3, after=True),
    "slow down": lambda: first(2, "503 Slow Down", "SlowDown"),
    "conflict": lambda: first(2, "409 Conflict", "ConditionalRequestConflict"),
}


@pytest.mark.parametrize("name", DISTURBANCES)
def test_a_creation_that_is_disturbed_is_still_ours(server: S3Server, store: Store, name: str) -> None:
    assert store.exclusive
    with server.disturbed(DISTURBANCES[name]()):
        assert store.put_once("a", b"ours")
    assert store.read("a") == b"ours"


@pytest.mark.parametrize("name", DISTURBANCES)
def test_the_same_bytes_of_somebody_else_are_not_ours(server: S3Server, store: Store, name: str) -> None:
    assert store.exclusive and store.put_once("a", b"the same")
    with server.disturbed(DISTURBANCES[name]()):
        assert not store.put_once("a", b"the same")


def test_a_disturbed_deletion_write_and_upload_are_carried_out(server: S3Server, store: Store, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"content")
    with server.disturbed(breaking(2, after=True)):
        store.write("a", b"1")
    with server.disturbed(breaking(2)):
        record = store.upload(tmp_path / "in", "b")
    with server.disturbed(breaking(2, only="GET")):
        store.download(record, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"content"
    with server.disturbed(breaking(2, only="POST", after=True)):
        store.delete_tree("")
    assert store.list() == []


def test_a_file_of_many_parts_comes_back_whole(store: Store, tmp_path: Path) -> None:
    """Above 100 MiB s3fs sends parts of 50 MiB."""
    with (tmp_path / "in").open("wb") as file:
        file.write(b"begin")
        file.seek(101 << 20)
        file.write(b"end")
    record = store.upload(tmp_path / "in", "large")
    store.download(record, tmp_path / "out")
    assert record.size == (101 << 20) + 3 and (tmp_path / "out").stat().st_size == record.size


def test_nothing_is_remembered_of_what_others_change(server: S3Server, store: Store) -> None:
    client, bucket = server.client(), store.uri.split("/")[2]
    assert store.list() == [] and not store.exists("x")
    client.put_object(Bucket=bucket, Key="folder/x", Body=b"1")
    assert store.list() == ["x"] and store.exists("x") and store.read("x") == b"1"
    client.put_object(Bucket=bucket, Key="folder/x", Body=b"another")
    assert store.read("x") == b"another"
    client.delete_object(Bucket=bucket, Key="folder/x")
    assert store.list() == [] and not store.exists("x")
    assert store.put_once("x", b"2")


def test_folders_that_a_console_made_are_no_files(server: S3Server, store: Store) -> None:
    client, bucket = server.client(), store.uri.split("/")[2]
    for key in ("folder/", "folder/a/", "folder/a/b", "folder/empty/"):
        client.put_object(Bucket=bucket, Key=key, Body=b"")
    assert store.list() == ["a/b"] and store.list("a") == ["a/b"] and store.list("empty") == []


def test_a_name_that_begins_like_a_folder_is_not_in_it(store: Store) -> None:
    store.write("run/a", b"1")
    store.write("run-2/a", b"1")
    assert store.list("run") == ["run/a"]
    store.delete_tree("run")
    assert store.list() == ["run-2/a"]


OPERATIONS = {
    "read": lambda store: store.read("a"),
    "exists": lambda store: store.exists("a"),
    "list": lambda store: store.list(),
    "write": lambda store: store.write("a", b"1"),
    "put_once": lambda store: store.put_once("a", b"1"),
    "upload": lambda store: store.upload(Path(__file__), "a"),
    "delete": lambda store: store.delete_tree("a"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_bucket_that_is_not_there_is_named_with_the_remedy(server: S3Server, operation: str) -> None:
    with pytest.raises(UserError, match="no such bucket: s3://nobodys-bucket/x; create it, or correct the address"):
        OPERATIONS[operation](Store("s3://nobodys-bucket/x"))


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        ("403 Forbidden", "AccessDenied", "correct the credentials"),
        ("403 Forbidden", "InvalidAccessKeyId", "correct the credentials"),
        ("403 Forbidden", "SignatureDoesNotMatch", "correct the credentials"),
        ("400 Bad Request", "ExpiredToken", "renew the credentials"),
        ("400 Bad Request", "InvalidToken", "renew the credentials"),
    ],
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_refused_credentials_are_the_users_at_once(
    server: S3Server, store: Store, operation: str, status: str, code: str, remedy: str
) -> None:
    with (
        server.disturbed(answering(status, code, lambda environ: True)),
        pytest.raises(UserError, match=f"{store.uri} .*{remedy}") as raised,
    ):
        OPERATIONS[operation](store)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("profile", [None, "nobodys"])
def test_missing_credentials_are_explained(store: Store, monkeypatch: pytest.MonkeyPatch, profile: str | None) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    if profile:
        monkeypatch.setenv("AWS_PROFILE", profile)
    S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(UserError, match=r"no usable credentials for s3://.*set AWS_PROFILE or AWS_ACCESS_KEY_ID"):
            Store(store.uri + "/anew").read("a")
    finally:
        S3FileSystem.clear_instance_cache()


def test_an_impossible_bucket_name_is_one_sentence(server: S3Server) -> None:
    with pytest.raises(UserError, match=r"Bad_Bucket!/x is no address of a store .*correct it") as raised:
        Store("s3://Bad_Bucket!/x").write("a", b"1")
    assert "\n" not in str(raised.value)


def test_many_threads_share_one_store(store: Store) -> None:
    found: list[bytes] = []

    def work(name: str) -> None:
        store.write(name, name.encode())
        found.append(store.read(name))

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [str(i).encode() for i in range(8)] and os.getpid() == store._pid
