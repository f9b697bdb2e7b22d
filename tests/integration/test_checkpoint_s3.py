"""Checkpoints in a real S3 server on loopback that now and then answers 503 or cuts an upload."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from checkpoint_faults import Events, make_store

pytest.importorskip("s3fs", reason="NOT TESTED: checkpoints on S3 need the extra `s3`")
pytest.importorskip("moto.server", reason="NOT TESTED: checkpoints on S3 need moto's server")

import fsspec

from model.checkpoint.lease import Fenced
from orchestrator.chaos.object_store import ObjectStore, serving


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with serving() as store:
        yield store


@pytest.fixture
def bucket(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ObjectStore]]:
    for variable, value in server.env.items():
        monkeypatch.setenv(variable, value)
    s3 = fsspec.filesystem("s3", skip_instance_cache=True)
    name = f"runs-{os.urandom(4).hex()}"
    s3.mkdir(name)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.setitem(fsspec.config.conf, "s3", {"default_block_size": 5 << 20})  # the smallest part there is
    yield f"s3://{name}/llama/checkpoints", server
    server.unavailable.clear()
    server.cut.clear()
    server.struck.clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def state(value: float = 0, size: int = 1000) -> dict[str, Any]:
    return {"model": {"w": torch.full((size,), float(value))}}


def test_a_run_on_an_object_store_saves_resumes_and_is_fenced(bucket: tuple[str, ObjectStore]) -> None:
    url, _ = bucket
    events, found = Events(), state()
    store = make_store(url, events, keep_last=2)
    assert store.load_latest(found) is None
    for step in (1, 2, 3):
        store.save(step, state(step), {"step": step}, wait=True)
    assert [c.step for c in store.steps()] == [2, 3]
    loaded = make_store(url).load_latest(found)
    assert loaded
    assert (loaded.step, found["model"]["w"][0].item()) == (3, 3)
    with pytest.raises(Fenced):
        store.save(4, state(4), {}, wait=True)
    assert [c.step for c in store.steps()] == [2, 3]


def test_damage_on_an_object_store_is_seen(bucket: tuple[str, ObjectStore]) -> None:
    url, _ = bucket
    store = make_store(url)
    store.load_latest(state())
    for step in (1, 2, 3):
        store.save(step, state(step), {}, wait=True)
    s3, root = fsspec.url_to_fs(url)
    path = f"{root}/step-000000003-e000001/rank-00000.safetensors"
    data = bytearray(s3.cat_file(path))
    data[-1] ^= 1
    s3.pipe_file(path, bytes(data))
    s3.rm_file(f"{root}/step-000000002-e000001/rank-00000.safetensors")
    events = Events()
    loaded = make_store(url, events).load_latest(state())
    assert loaded
    assert loaded.step == 1
    assert events.kinds() == ["passed_over", "passed_over", "loaded"]


def test_5xx_answers_and_cut_uploads_are_retried(bucket: tuple[str, ObjectStore]) -> None:
    url, trouble = bucket
    events = Events()
    store = make_store(url, events, retries=3)
    store.load_latest(state())
    trouble.unavailable += [("PUT", "rank-00000"), ("PUT", "manifest.json"), ("PUT", "COMMITTED")]
    trouble.cut += [("PUT", "rank-00000"), ("PUT", "index.json")]
    store.save(1, state(1), {}, wait=True)
    assert events.kinds() == ["saved"]
    assert len(trouble.struck) == 5
    trouble.unavailable += [("GET", "rank-00000"), ("GET", "index.json")]
    found = state()
    assert store.load_latest(found)
    assert found["model"]["w"][0] == 1
    assert len(trouble.struck) == 7


def test_an_upload_in_parts_of_which_one_is_lost_for_good_leaves_no_object(
    bucket: tuple[str, ObjectStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large files go up in parts: an upload that is given up must not be completed with what had arrived."""
    url, trouble = bucket
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
    events = Events()
    store = make_store(url, events)
    big = 9_000_000  # 36 MB: three parts, as blocks of 16 MiB are handed over
    store.load_latest(state(size=big))
    trouble.unavailable += [("PUT", "partNumber=2")] * 20
    store.save(1, state(1, big), {}, wait=True)
    assert events.kinds() == ["save_failed"]
    assert trouble.struck
    assert store.storage.list() == {"epochs": -1}
    assert store.storage.fs.call_s3("list_multipart_uploads", Bucket=url.split("/")[2]).get("Uploads", []) == []
    trouble.unavailable.clear()
    store.save(1, state(1, big), {}, wait=True)
    assert store.saved_step == 1
    found = state(size=big)
    assert store.load_latest(found)
    assert torch.equal(found["model"]["w"], state(1, big)["model"]["w"])


def test_of_two_that_start_at_once_one_gets_the_epoch(bucket: tuple[str, ObjectStore]) -> None:
    url, _ = bucket
    first, second = make_store(url).storage, make_store(url).storage
    assert first.create("epochs/epoch-000001", b"the first")
    assert not second.create("epochs/epoch-000001", b"the second")  # a conditional put, no look before
    assert second.read("epochs/epoch-000001") == b"the first"
