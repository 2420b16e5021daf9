import errno
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pmm.utils.errors import CannotWrite, InvalidFile
from pmm.utils.files import cannot_write, claimed, existing_file, output_file, replacing, sha256, write_file
from tests.refusals import refuses


def test_write_replaces_whole(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_file(path, "one")
    write_file(path, b"two")
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["file.txt"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def test_content_and_name_are_on_disk_in_this_order(tmp_path, monkeypatch):
    """A power cut leaves the old file or the new one: not a name without content, not a rename that is forgotten."""
    path, done, fsync, rename = tmp_path / "file.txt", [], os.fsync, Path.replace

    def synced(handle):
        found = os.fstat(handle)
        done.append("folder synced" if stat.S_ISDIR(found.st_mode) else f"{found.st_size} bytes synced")
        fsync(handle)

    def renamed(source, target):
        assert source.parent == path.parent  # a rename does not cross disks
        done.append("renamed")
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    write_file(path, "twelve bytes")
    assert done == ["12 bytes synced", "renamed", "folder synced"]


def test_of_a_link_the_file_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    real, link = tmp_path / "there" / "real.json", tmp_path / "link.json"
    link.symlink_to(real)
    for content in ("one", "two"):  # the link leads to nothing at first
        assert output_file(link) == link
        write_file(link, content)
        assert (link.is_symlink(), real.read_text()) == (True, content)
    with refuses(CannotWrite, "file to read", path=link):
        output_file(link, real)
    assert sorted(os.listdir(tmp_path)) == ["link.json", "there"]


def test_devices_pipes_and_open_streams_are_refused_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "out").symlink_to("/dev/null")
    before = os.stat("/dev/null").st_rdev
    for path in (tmp_path / "pipe", tmp_path / "out", "/dev/null", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        for write in (output_file, lambda path: write_file(path, "x")):
            with refuses(CannotWrite, "no file on a disk", path=path):
                write(Path(path))
    assert os.stat("/dev/null").st_rdev == before
    assert (tmp_path / "pipe").is_fifo()


def test_names_that_are_no_utf8_are_written_as_their_bytes(tmp_path):
    write_file(tmp_path / "list.csv", "caf\udce9,1\n")
    assert (tmp_path / "list.csv").read_bytes() == b"caf\xe9,1\n"


def test_failure_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "file.txt"
    write_file(path, "old")

    def half():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.bin"
    write_file(path, b"old")
    script = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from pmm.utils.files import write_file\nfrom pmm.utils.errors import CannotWrite\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_file(Path(sys.argv[1]), bytes(5000))\n"
        "except CannotWrite as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert done.stdout.startswith(f"{path}: "), done.stderr
    assert "File too large" in done.stdout
    assert "unchanged" in done.stdout
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_unwritable_places_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with refuses(CannotWrite, "it is a file", path=tmp_path / "file"):
        write_file(tmp_path / "file" / "below", "x")
    with refuses(CannotWrite, "folder", path=tmp_path, hint="name of a file"):
        write_file(tmp_path, "x")


def test_a_folder_has_one_writer(tmp_path):
    script = (
        "import sys; from pathlib import Path\n"
        "from pmm.utils.errors import CannotWrite; from pmm.utils.files import claimed\n"
        "try:\n  with claimed(Path(sys.argv[1])): print('got it')\n"
        "except CannotWrite as error: print(error)\n"
    )

    def other():
        return subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True).stdout

    with claimed(tmp_path):
        assert other().startswith(f"{tmp_path}: it is in use by another process")
    assert "got it" in other()


def test_a_disk_without_locks_is_not_taken_for_another_writer(tmp_path, monkeypatch):
    import fcntl

    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with (
        refuses(CannotWrite, "locked", "No locks available", path=tmp_path, hint="another disk"),
        claimed(tmp_path),
    ):
        pass


def test_existing_file(tmp_path):
    with refuses(InvalidFile, "does not exist", path=tmp_path / "no.pth", expected="a checkpoint"):
        existing_file(tmp_path / "no.pth", "a checkpoint")
    with refuses(InvalidFile, "folder", path=tmp_path, expected="a checkpoint"):
        existing_file(tmp_path, "a checkpoint")


def test_sha256(tmp_path):
    write_file(tmp_path / "x", b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_name_with_another_ending_is_refused(tmp_path):
    assert output_file(tmp_path / "a.PLAN", suffixes=(".plan", ".engine")) == tmp_path / "a.PLAN"
    for name in ("a.json", "a"):
        with refuses(CannotWrite, path=tmp_path / name, expected=".plan or .engine"):
            output_file(tmp_path / name, suffixes=(".plan", ".engine"))


def test_a_check_and_a_refused_command_leave_no_folder(tmp_path):
    output_file(tmp_path / "a" / "b" / "c.json")
    with claimed(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "empty.log").touch()
    assert list(tmp_path.iterdir()) == []
    with claimed(tmp_path / "a" / "b"):
        write_file(tmp_path / "a" / "b" / "c.json", "{}")
    (tmp_path / "old").mkdir()
    with claimed(tmp_path / "old"):
        (tmp_path / "old" / "logs").mkdir()
    assert list((tmp_path / "old").iterdir()) == []
    assert (tmp_path / "a" / "b" / "c.json").is_file()


def test_a_folder_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (output_file, lambda path: write_file(path, "x")):
        with refuses(CannotWrite, "it is a file", path=tmp_path / "file", expected="a folder", hint=""):
            write(tmp_path / "file" / "a" / "b.json")


@pytest.mark.parametrize("name", ["x" * 300 + ".json", "x" * 250 + ".json", "x" * 300 + "/a.json"])
def test_a_name_that_is_too_long_is_refused_before_the_work(tmp_path, name):
    for write in (output_file, lambda path: write_file(path, "x")):
        with refuses(CannotWrite, "too long", hint="shorter name") as caught:
            write(tmp_path / name)
        assert "permissions" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.EACCES, "permissions"), (errno.EROFS, "another place"), (errno.ENOSPC, "make room")]
)
def test_the_advice_fits_the_reason(code, advice):
    assert advice in cannot_write(Path("a"), OSError(code, os.strerror(code))).hint
    assert cannot_write(Path("a"), OSError(errno.EIO, "I/O error")).hint == "earlier files are unchanged"


@pytest.mark.parametrize("failing", ["stat", "rmtree"])
def test_a_cleanup_that_fails_does_not_hide_the_error(tmp_path, monkeypatch, failing):
    def fail(path, *args, **options):
        raise OSError(errno.ESTALE, "Stale file handle")

    def work():
        with claimed(tmp_path / "new"):
            (tmp_path / "new" / "logs").mkdir()
            monkeypatch.setattr(*((Path, "is_file") if failing == "stat" else (shutil, "rmtree")), fail)
            raise ValueError("the real one")

    with pytest.raises(ValueError, match="the real one"):
        work()


def _begin_and_stay(begun):
    begun.set()
    time.sleep(20)


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    fork = multiprocessing.get_context("fork")
    begun = fork.Event()
    with claimed(tmp_path):
        child = fork.Process(target=_begin_and_stay, args=(begun,))
        child.start()
        assert begun.wait(20)
    try:
        with claimed(tmp_path):  # at once, though the child goes on
            assert child.is_alive()
    finally:
        child.kill()
        child.join()
