"""What `flexkv doctor` says of the directories of the SSD tier, on real file systems as far as there are some."""

import os
from pathlib import Path

import pytest
from flexkv.config import Settings, load
from flexkv.config.sizes import GIB, MIB, TIB
from flexkv.doctor import drives
from flexkv.doctor.drives import Mount
from flexkv.doctor.finding import Finding, Verdict

pytestmark = pytest.mark.usefixtures("clean_environment")


def settings(*paths: Path, size: object = "1MB") -> Settings:
    given = {"ssd_cache_gb": size, "ssd_cache_dir": ";".join(map(str, paths))}
    return load(extra=given, extra_origin="test")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "nvme"
    path.mkdir(mode=0o700)
    return path


def test_without_an_ssd_tier_there_is_one_line() -> None:
    assert list(drives.check_drives(load())) == [Finding("SSD tier", "none (ssd_cache_gb is 0)")]


def test_a_directory_is_looked_at_and_left_as_it_is(directory: Path) -> None:
    findings = list(drives.check_drives(settings(directory)))
    assert [one.looked_at.split()[0] for one in findings] == ["SSD", "file", "space"]
    assert findings[0].verdict is Verdict.OK
    assert findings[0].found == "ours, writable, 0700"
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize(
    ("mode", "verdict"),
    [(0o700, Verdict.OK), (0o755, Verdict.BETTER), (0o770, Verdict.WRONG), (0o702, Verdict.WRONG)],
)
def test_whose_directory_may_be_trusted(directory: Path, mode: int, verdict: Verdict) -> None:
    directory.chmod(mode)
    found = drives.directory(str(directory), may_make_parents=False)
    assert found.verdict is verdict
    assert bool(found.advice) == (verdict is not Verdict.OK)
    if verdict is Verdict.WRONG:
        assert "below it" in found.advice  # not: chmod /tmp
        (directory / "node.secret").touch()
        assert drives.directory(str(directory), may_make_parents=False).advice == f"chmod go-w {directory}"


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert drives.directory(str(tmp_path / "new"), may_make_parents=False).verdict is Verdict.OK
    below = str(tmp_path / "not mounted" / "flexkv")
    found = drives.directory(below, may_make_parents=False)
    assert (found.verdict, found.advice) == (Verdict.WRONG, "mount the drive, or make that directory")
    assert drives.directory(below, may_make_parents=True).verdict is Verdict.OK
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # the fixture's


def test_what_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert drives.directory(str(tmp_path / "file"), may_make_parents=False).verdict is Verdict.WRONG
    assert drives.directory(str(tmp_path / "file" / "below"), may_make_parents=False).verdict is Verdict.WRONG


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user(directory: Path) -> None:
    os.chown(directory, 12345, -1)
    found = drives.directory(str(directory), may_make_parents=False)
    assert (found.verdict, found.found) == (Verdict.WRONG, "belongs to uid 12345, not to uid 0")


# ---- file systems


def test_memory_is_no_drive() -> None:
    mount = drives.mount_of("/dev/shm")
    assert mount.file_system == "tmpfs"
    found = drives.file_system("/dev/shm", mount, wants_direct=True)
    assert found.verdict is Verdict.BETTER
    assert "host memory itself" in found.found


def test_file_systems_and_direct_io(directory: Path) -> None:
    refusal = drives.direct_io_refusal(str(directory))
    if drives.mount_of(str(directory)).file_system in ("ext4", "xfs"):
        assert refusal == ""
    found = drives.file_system(str(directory), Mount("ext4", "nvme0n1"), wants_direct=True)
    assert found.verdict is (Verdict.BETTER if refusal else Verdict.OK)
    assert found.found == "ext4 on nvme0n1" + (
        f"; O_DIRECT is refused ({refusal}): through the page cache" if refusal else ", O_DIRECT works"
    )
    for kind in ("overlay", "nfs4"):
        found = drives.file_system(str(directory), Mount(kind, "x"), wants_direct=False)
        assert found.verdict is Verdict.BETTER
    assert list(directory.iterdir()) == []


def test_direct_io_that_is_refused(directory: Path) -> None:
    directory.rmdir()  # an error of the system is a reason, too
    assert drives.direct_io_refusal(str(directory)) == "No such file or directory"
    found = drives.file_system(str(directory), Mount("ext4", "sda"), wants_direct=True)
    assert found.verdict is Verdict.BETTER
    assert "through the page cache" in found.found
    assert drives.file_system(str(directory), Mount("ext4", "sda"), wants_direct=False).verdict is Verdict.OK


def test_the_drive_below_a_directory(tmp_path: Path) -> None:
    real = os.path.realpath(tmp_path)
    info = tmp_path / "mountinfo"
    info.write_text(
        "20 1 0:30 / / rw,relatime - overlay overlay rw,lowerdir=x\n"
        f"21 20 259:2 / {real} rw,noatime shared:1 - ext4 /dev/nvme0n1p2 rw,data=writeback\n"
        f"22 21 0:50 / {real}/a\\040b rw - xfs /dev/mapper/pool rw\n"
        f"23 20 0:51 / {real}/nv rw - tmpfs tmpfs rw\n"
    )
    partition = tmp_path / "devices/nvme0n1/nvme0n1p2"
    partition.mkdir(parents=True)
    (partition / "partition").touch()
    (tmp_path / "dev/block").mkdir(parents=True)
    (tmp_path / "dev/block/259:2").symlink_to(partition)
    assert drives.mount_of(f"{real}/nvme", info, tmp_path) == Mount("ext4", "nvme0n1", "rw,noatime,rw,data=writeback")
    assert drives.mount_of(f"{real}/a b/flexkv", info, tmp_path).device == "/dev/mapper/pool"
    assert drives.mount_of("/elsewhere", info, tmp_path).file_system == "overlay"


# ---- space


def test_space_that_is_not_there(directory: Path) -> None:
    other = directory.parent / "other"
    other.mkdir(mode=0o700)
    (found,) = drives.space(settings(directory, size="1MB"), [str(directory)])
    assert found.verdict is Verdict.OK
    (found,) = drives.space(settings(directory, other, size=1024 * TIB // GIB), [str(directory), str(other)])
    assert found.verdict is Verdict.BETTER
    info = os.statvfs(directory)
    free = info.f_bavail * info.f_frsize
    assert "1 PiB wanted" in found.found
    suggested = int(found.advice.rpartition("=")[2] or 0)
    assert abs(suggested - free // GIB) <= 2  # less what the node leaves to others


def test_what_the_cache_has_already_is_room(directory: Path) -> None:
    for name in ("01.blocks", "foreign"):
        with (directory / name).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 64 * MIB)
    info = os.statvfs(directory)
    free = info.f_bavail * info.f_frsize - min(info.f_blocks * info.f_frsize // 100, GIB)
    (found,) = drives.space(settings(directory, size=f"{free // MIB + 32}MB"), [str(directory)])
    assert found.verdict is Verdict.OK
    assert "(64 MiB of them in use by the cache)" in found.found
    (found,) = drives.space(settings(directory, size=f"{free // MIB + 96}MB"), [str(directory)])
    assert found.verdict is Verdict.BETTER


def test_two_directories_on_one_drive(directory: Path) -> None:
    other = directory.parent / "other"
    other.mkdir(mode=0o700)
    findings = list(drives.check_drives(settings(directory, other)))
    assert findings[-1].verdict is Verdict.BETTER
    assert findings[-1].looked_at.startswith("directories on ")
    assert f"2: {directory}, {other}" in findings[-1].found
    assert not list(drives.shared_devices({"/a": Mount("ext4", "sda"), "/b": Mount("ext4", "sdb")}))


def test_a_directory_without_a_size() -> None:
    (found,) = drives.check_drives(load(extra={"ssd_cache_dir": "/a"}))
    assert found.verdict is Verdict.WRONG
    assert "ssd_cache_gb: not set, but ssd_cache_dir is, /a" in found.found
    (found,) = drives.check_drives(load(extra={"ssd_cache_dir": "/a", "ssd_cache_gb": 0}))
    assert found.verdict is Verdict.OK
