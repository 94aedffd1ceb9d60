"""Caches of a donor's readings: what comes back, resuming, and refusals."""

from types import SimpleNamespace

import pytest
import torch

from bytelm.byteify import cache
from bytelm.byteify.cache import cache_readings, read_shard, spread
from bytelm.byteify.donor import open_donor
from bytelm.byteify.teacher import read_document, read_vocabulary
from bytelm.errors import DataError
from test_byteify import TEXT, save_donor

DOCUMENTS = [TEXT[at : at + 150] for at in range(0, 900, 150)]


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    return open_donor(save_donor(tmp_path_factory.mktemp("donor"), "llama 3.1"))


@pytest.fixture(scope="module")
def vocabulary(donor):
    return read_vocabulary(donor)


def shards(folder):
    return sorted(folder.glob("shard-*.safetensors"))


def test_readings_come_back(donor, vocabulary, tmp_path):
    left_out = [*DOCUMENTS, "with <|endoftext|> in it"]
    assert cache_readings(donor, vocabulary, left_out, tmp_path, kept=257, shard_bytes=400) == 1
    assert len(shards(tmp_path)) > 2
    found = [one for path in shards(tmp_path) for one in read_shard(path)]
    assert [one.data.decode() for one in found] == DOCUMENTS
    for one, text in zip(found, DOCUMENTS, strict=True):
        wanted = read_document(donor, vocabulary, text)
        assert one.tokens == wanted.tokens
        torch.testing.assert_close(one.states, wanted.states.half())
        following = torch.from_numpy(wanted.targets.next)
        torch.testing.assert_close(one.next, following, rtol=2e-3, atol=1e-6)
        ends = torch.from_numpy(wanted.targets.ends)
        torch.testing.assert_close(one.ends, ends, rtol=1e-3, atol=1e-6)


def test_what_is_not_kept_is_spread_evenly():
    found = spread(torch.tensor([[3, 256]]), torch.tensor([[0.5, 0.3]]))
    assert float(found[0, 3]) == pytest.approx(0.5)
    assert float(found[0, 256]) == pytest.approx(0.3)
    assert float(found[0, 0]) == pytest.approx(0.2 / 255)
    assert float(found.sum()) == pytest.approx(1)


def test_a_stopped_cache_resumes_to_the_same_files(donor, vocabulary, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    cache_readings(donor, vocabulary, DOCUMENTS, whole, shard_bytes=300)
    read = []

    def stop(done):
        read.append(done)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_readings(donor, vocabulary, DOCUMENTS, stopped, shard_bytes=300, report=stop)
    assert len(shards(stopped)) == 1
    read.clear()
    cache_readings(donor, vocabulary, DOCUMENTS, stopped, shard_bytes=300, report=read.append)
    assert read == [3, 4, 5, 6]  # the first shard, of two documents, is not read again
    for one, other in zip(shards(whole), shards(stopped), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_another_cache_is_not_continued(donor, vocabulary, tmp_path):
    cache_readings(donor, vocabulary, DOCUMENTS[:1], tmp_path)
    with pytest.raises(DataError, match="another donor or text"):
        cache_readings(donor, vocabulary, DOCUMENTS[:2], tmp_path)


def test_a_full_disk_is_refused_before_anything_is_read(donor, vocabulary, tmp_path, monkeypatch):
    usage = SimpleNamespace(total=1_000_000, free=40_000)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
    reads = []
    with pytest.raises(DataError, match=r"needs 0[.]\d GB, .* keep fewer outcomes"):
        cache_readings(donor, vocabulary, DOCUMENTS, tmp_path, report=reads.append)
    assert not reads
    assert not shards(tmp_path)


def test_a_damaged_shard_is_named(tmp_path):
    path = tmp_path / "shard-00000.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"shard-00000.* is damaged"):
        read_shard(path)
