"""Files and folders appear under their name when they are complete."""

import os
import subprocess
import sys
from contextlib import ExitStack

import pytest

from stable_diffusion.files import whole
from stable_diffusion.files.whole import UNFINISHED, check_space, new_file, new_folder

# --- a file ----------------------------------------------------------------------------------------------------------


def test_a_file_appears_when_it_is_complete_and_on_the_disk(tmp_path, monkeypatch):
    path, done = tmp_path / f"{'ä' * 120}.bin", []
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(("synced", os.fstat(handle).st_size)))
    path.write_bytes(b"before")
    with new_file(path) as partial:
        partial.write_bytes(b"after")
        assert path.read_bytes() == b"before" and partial in UNFINISHED and not done
        monkeypatch.setattr(os, "replace", lambda *paths, replace=os.replace: done.append("named") or replace(*paths))
    assert path.read_bytes() == b"after" and os.listdir(tmp_path) == [path.name] and not UNFINISHED
    assert done == [("synced", 5), "named"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_writing_that_fails_leaves_what_was_there(tmp_path, error):
    (tmp_path / "a").write_bytes(b"before")
    with pytest.raises(error), new_file(tmp_path / "a") as partial:
        partial.write_bytes(b"half")
        raise error
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"before" and not UNFINISHED


def test_several_may_write_one_file(tmp_path):
    """Also one that begins as the first is renamed, in the moment before it gives its name free."""
    with new_file(tmp_path / "a") as one, new_file(tmp_path / "a") as two:
        one.write_bytes(b"one")
        two.write_bytes(b"two")
    assert (tmp_path / "a").read_bytes() == b"one"
    with pytest.raises(FileExistsError), new_file(tmp_path / "a", overwrite=False) as three:
        three.write_bytes(b"three")
    assert (tmp_path / "a").read_bytes() == b"one" and os.listdir(tmp_path) == ["a"]


def test_a_file_renamed_as_it_is_claimed_is_not_written_to(tmp_path, monkeypatch):
    def lock(handle, lock=whole._lock):
        (partial,) = tmp_path.glob(".*.partial")
        partial.rename(tmp_path / "a")  # by the process that held it
        monkeypatch.setattr(whole, "_lock", lock)
        return True

    monkeypatch.setattr(whole, "_lock", lock)
    with new_file(tmp_path / "a") as partial:
        assert (tmp_path / "a").is_file() and partial.is_file() and not partial.samefile(tmp_path / "a")


def test_a_writer_that_begins_as_another_ends_keeps_its_file(tmp_path, monkeypatch):
    """It takes the name that the first has just renamed."""
    begun = []
    with ExitStack() as second:

        def replace(*paths, replace=os.replace):
            replace(*paths)
            monkeypatch.setattr(os, "replace", replace)
            begun.append(second.enter_context(new_file(tmp_path / "a")))

        monkeypatch.setattr(os, "replace", replace)
        with new_file(tmp_path / "a") as one:
            one.write_bytes(b"one")
        assert begun == [one] and one.is_file()
        one.write_bytes(b"two")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"two"


def test_what_a_killed_process_left_is_written_over(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from stable_diffusion.files.whole import new_file\n"
        "with new_file(Path(sys.argv[1])) as partial: partial.write_text('a long half'), os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "a"]).returncode == -9
    (left,) = tmp_path.iterdir()
    with new_file(tmp_path / "a") as partial:
        assert partial == left
        partial.write_text("whole")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "whole"


# --- a folder; tests/cli/test_convert.py has what is left of one that fails or is killed ---------------------------


def test_a_folder_appears_when_it_is_complete(tmp_path, monkeypatch):
    """Also in place of an empty one."""
    dest, synced = tmp_path / "new", []
    monkeypatch.setattr(os, "fsync", synced.append)
    dest.mkdir()
    with new_folder(dest) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert os.listdir(dest) == synced == []
    assert (dest / "sub" / "file").read_text() == "x" and len(synced) == 4  # the file and the folders around it
    assert os.listdir(tmp_path) == ["new"]


def test_a_place_that_is_taken_is_left_alone(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for path, reason in {"full": "not empty", "file": "is a file", "no/where": "does not exist"}.items():
        with pytest.raises(ValueError, match=reason), new_folder(tmp_path / path):
            raise AssertionError("it was let in")
    with pytest.raises(ValueError, match="not empty"), new_folder(tmp_path / "new") as folder:
        (folder / "file").write_text("x")
        (tmp_path / "full").rename(tmp_path / "new")  # meanwhile
    assert sorted(os.listdir(tmp_path)) == ["file", "new"] and os.listdir(tmp_path / "new") == ["mine"]


def test_two_runs_at_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from stable_diffusion.files.whole import new_folder\n"
        "with new_folder(Path(sys.argv[1])): pass"
    )
    with new_folder(tmp_path / "new") as folder:
        (folder / "file").write_text("x")
        other = subprocess.run([sys.executable, "-c", code, tmp_path / "new"], capture_output=True, text=True)
        assert "is being written by another run" in other.stderr
    assert os.listdir(tmp_path / "new") == ["file"]


def test_the_disk_is_asked_before(tmp_path, monkeypatch):
    check_space(tmp_path / "new", 1)
    monkeypatch.setattr(whole.shutil, "disk_usage", lambda path: type("", (), {"free": 2_000_000_000})())
    with pytest.raises(OSError, match=r"needs 5.10 GB, the disk has 2.00 GB left: free disk space"):
        check_space(tmp_path / "new", 5_100_000_000)
