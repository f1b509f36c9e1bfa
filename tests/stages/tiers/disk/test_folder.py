"""The folder of a disk tier: whose it is, one beside it where it is taken, or none at all."""

from __future__ import annotations

import logging
import os
import pwd
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tierloom.stages.errors import ConfigError, TierDown
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.tiers.disk import default_folder as folder
from tierloom.stages.tiers.disk.default_folder import DEFAULT
from tierloom.stages.tiers.disk.folder_lock import FolderLock
from tierloom.stages.tiers.disk.tier import Disk, DiskOptions
from tierloom.stages.tiers.files.space import FilesOptions
from tierloom.stages.tiers.files.tier import Files
from tierloom.stages.user_home import cache_folder, expanded
from tierloom.testing import SIZE, TierBench, key_of

A, B = b"a" * 32, b"b" * 32
NOWHERE = "/dev/null/home"
"""What not even root can make a folder in."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def disk(ctx, owner: bytes, path: str = DEFAULT) -> Disk:
    options = DiskOptions(path=path, capacity=8 * SIZE, segment=4 * PAGE, keep_free=0)
    return Disk(options, ctx._replace(namespace=owner))


def where(tier: Disk) -> str:
    return tier._store._folder.name


class TestFolder(TierBench):
    """Objects of the bench carry a namespace of their own, so `has` stands for `read` here."""

    @asynccontextmanager
    async def engine(self, ctx, owner: bytes, path: str = DEFAULT):
        tier = disk(ctx, owner, path)
        await tier.open()
        try:
            yield tier
        finally:
            await tier.close()

    @pytest.mark.anyio
    async def test_each_engine_finds_its_own_again(self, ctx, home, caplog) -> None:
        """Two models with default settings, started in either order."""
        caplog.set_level(logging.INFO)
        async with self.engine(ctx, A) as a, self.engine(ctx, B) as b:
            assert (where(a), where(b)) == ("tierloom", "tierloom-2")
            await self.put(a, 1)
            await self.put(b, 2)
        assert [r.getMessage() for r in caplog.records if "disk tier uses" in r.getMessage()] == [
            f"disk tier uses {home}/.cache/tierloom-2: other engines use the folders before it"
        ]
        async with self.engine(ctx, B) as b, self.engine(ctx, A) as a:
            assert (where(a), where(b)) == ("tierloom", "tierloom-2")
            assert await a.exists([key_of(1), key_of(2)]) == [True, False]
            assert await b.exists([key_of(1), key_of(2)]) == [False, True]

    @pytest.mark.anyio
    async def test_copies_of_one_model_take_them_in_order(self, ctx, home) -> None:
        for _ in range(2):
            async with self.engine(ctx, A) as one, self.engine(ctx, A) as other:
                assert (where(one), where(other)) == ("tierloom", "tierloom-2")

    @pytest.mark.anyio
    async def test_a_new_model_takes_the_first_that_is_free(self, ctx, home) -> None:
        """Folders do not pile up."""
        for owner in (A, B, A):
            async with self.engine(ctx, owner) as tier:
                assert where(tier) == "tierloom"
        async with self.engine(ctx, A), self.engine(ctx, B) as tier:
            assert where(tier) == "tierloom-2"
        async with self.engine(ctx, b"c" * 32) as tier:
            assert where(tier) == "tierloom"

    @pytest.mark.anyio
    @pytest.mark.parametrize("path", [f"{DEFAULT}/tp1of2", f"{DEFAULT}-shared"])
    async def test_folders_of_ranks_and_servers_are_defaults_too(self, ctx, home, path) -> None:
        async with self.engine(ctx, A, path) as one, self.engine(ctx, A, path) as other:
            name = Path(path).name
            assert (where(one), where(other)) == (name, f"{name}-2")
            assert one._store._folder.parent == other._store._folder.parent

    @pytest.mark.anyio
    async def test_a_folder_that_the_user_chose_is_his_to_mend(self, ctx, home) -> None:
        path = str(home / "kv")
        async with self.engine(ctx, A, path):
            other = disk(ctx, B, path)
            with pytest.raises(
                ConfigError, match=r"in use by another.*TIERLOOM_DIR, or the tier's"
            ):
                await other.open()
            await other.close()
        assert not (home / "kv-2").exists()

    @pytest.mark.anyio
    async def test_there_is_an_end_to_them(self, ctx, home, monkeypatch) -> None:
        monkeypatch.setattr(folder, "SERIES", 2)
        async with self.engine(ctx, A), self.engine(ctx, A):
            third = disk(ctx, A)
            with pytest.raises(TierDown, match=r"1 beside it are in use.*set TIERLOOM_DIR"):
                await third.open()
            await third.close()

    @pytest.mark.anyio
    @pytest.mark.parametrize("kind", ["disk", "files"])
    async def test_no_home_to_write_to(self, ctx, monkeypatch, kind) -> None:
        """A default is a tier that is down, what the user chose is his mistake."""
        monkeypatch.setenv("HOME", NOWHERE)
        for path, error in ((f"{DEFAULT}-x", TierDown), (f"{NOWHERE}/kv", ConfigError)):
            made = disk(ctx, A, path) if kind == "disk" else Files(FilesOptions(path=path), ctx)
            with pytest.raises(error, match=f"{NOWHERE}/.*write permission") as caught:
                await made.open()
            assert ("set TIERLOOM_DIR" in str(caught.value)) == (error is TierDown)
            await made.close()

    @pytest.mark.anyio
    async def test_whose_a_folder_is_may_be_unknown(self, ctx, home) -> None:
        first = home / ".cache" / "tierloom"
        (first / "lock").mkdir(parents=True)  # nothing that can be read, nor locked
        assert FolderLock.owner_of(first) == FolderLock.owner_of(home / "nowhere") == ""
        tier = disk(ctx, A)
        with pytest.raises(TierDown, match="Is a directory"):
            await tier.open()
        await tier.close()


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """An id that nobody knows, and no HOME: as containers have them."""

    def nobody(_: object) -> None:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert os.path.expanduser("~") == "~", "Python knows none"
    assert expanded("~/.cache/kv") == Path("/.cache/kv")
    assert expanded("/data/kv") == Path("/data/kv")
    assert cache_folder() == Path("/.cache/tierloom")
    with pytest.raises(ConfigError, match="~nobody-at-all/kv: there is no user 'nobody-at-all'"):
        expanded("~nobody-at-all/kv")
