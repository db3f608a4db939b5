"""The folder of compiled programs: private, trusted only where nobody else can write, off where asked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ches_jax.errors import ChesError
from ches_jax.runs import compilation_cache
from ches_jax.runs.compilation_cache import JAX_VARIABLE, VARIABLE, default_folder, prepared, shorten, use


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """The settings that jax gets; the user's cache is in ``tmp_path``, which pytest makes private."""
    given = {}
    monkeypatch.setattr(compilation_cache, "_set", given.update)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in (VARIABLE, JAX_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return given


def used() -> Path:
    """The folder that is used by default; there is one."""
    folder = use()
    assert folder is not None
    return folder


def test_the_default_folder_is_private_and_of_this_machine(settings, monkeypatch):
    folder = used()
    assert folder == default_folder() and settings["jax_compilation_cache_dir"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700 and folder.parent.parent.stat().st_mode & 0o777 == 0o700
    assert "jaxlib" in folder.name
    monkeypatch.setattr(compilation_cache, "processor", lambda: "another")
    assert default_folder() != folder


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777, 0o702])
def test_a_folder_that_others_can_write_to_is_not_used(settings, capsys, tmp_path, mode):
    folder = used()
    folder.chmod(mode)
    settings.clear()
    assert use() is None and not settings and "chmod" in capsys.readouterr().err
    with pytest.raises(ChesError, match="others can write"):
        use(str(folder))


def test_a_folder_that_can_be_replaced_or_is_a_link_or_no_folder_is_not_used(settings, tmp_path):
    open_place, link, file = tmp_path / "open", tmp_path / "link", tmp_path / "file"
    (open_place / "mine").mkdir(mode=0o700, parents=True)
    open_place.chmod(0o777)
    assert "others can write" in str(prepared(open_place / "mine"))
    open_place.chmod(0o1777)  # sticky: nobody renames what is another's
    assert prepared(open_place / "mine") is None
    link.symlink_to(open_place / "mine")
    file.write_text("")
    for place in (link, file):
        with pytest.raises(ChesError, match="not a folder"):
            use(str(place))
    with pytest.raises(ChesError):
        use(str(file / "below"))


def test_a_folder_of_another_user_is_not_used(settings, monkeypatch):
    folder = used()
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert "owned by user" in str(prepared(folder))


def test_who_says_where(settings, monkeypatch, tmp_path):
    monkeypatch.setenv(JAX_VARIABLE, "elsewhere")
    assert str(use()) == "elsewhere" and not settings  # jax reads it itself
    monkeypatch.setenv(VARIABLE, "off")
    assert use() is None and settings == {"jax_compilation_cache_dir": None}
    assert use(str(tmp_path / "named")) == tmp_path / "named"


def test_the_oldest_programs_go_first(tmp_path):
    for age, name in enumerate(["new", "middle", "old"]):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    shorten(tmp_path, 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["middle", "new"]
    shorten(tmp_path / "none", 20)


def test_the_command_sets_it_before_jax_and_without_it():
    """``JAX_COMPILATION_CACHE_DIR`` in the environment is what a jax that is imported later reads."""
    code = (
        "import os, sys; from ches_jax.runs.compilation_cache import use\n"
        "folder = use(sys.argv[1]); assert 'jax' not in sys.modules\n"
        "assert os.environ['JAX_COMPILATION_CACHE_DIR'] == str(folder)\n"
        "use('off'); assert 'JAX_COMPILATION_CACHE_DIR' not in os.environ"
    )
    folder = default_folder().parent / "test"
    try:
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=300)
    finally:
        folder.rmdir()
