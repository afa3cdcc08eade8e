import os
import socket

import pytest

from dirotq.errors import ConfigError
from dirotq.files.walk import VISITS, readable, walk


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    for name in ("b/z", "b/a", "a", "c/d/e"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names(root, **more):
    return [p.relative_to(root).as_posix() for p in walk(root, **more)]


def test_without_links_it_is_rglob(root):
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x").touch()
    assert walk(root) == sorted(p for p in root.rglob("*") if p.is_file())


def test_links_are_followed_and_keep_their_names(root, tmp_path):
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "x").write_text("x")
    (tmp_path / "hop").symlink_to(outside)  # a chain, and a link within a linked folder
    (outside / "deep" / "y").symlink_to(root / "a")
    (root / "linked").symlink_to(tmp_path / "hop")
    (root / "f").symlink_to(root / "b" / "z")
    assert names(root) == [
        "a", "b/a", "b/z", "c/d/e", "f", "linked/deep/x", "linked/deep/y",
    ]  # fmt: skip
    assert "linked/deep/x" not in names(root, skip=lambda path: path.name == "linked")
    assert names(root / "linked") == ["deep/x", "deep/y"]


def test_every_link_is_shown_before_it_is_followed(root, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "inner").symlink_to(root / "a")
    (root / "linked").symlink_to(tmp_path / "outside")
    seen = []
    walk(root, check=seen.append)
    assert seen == [root / "linked", root / "linked" / "inner"]


@pytest.mark.parametrize("target", ["c", ".", "..", "/"])
def test_a_link_back_is_refused_before_it_is_entered(root, target):
    (root / "c" / "d" / "back").symlink_to(root / target)
    with pytest.raises(ConfigError, match=r"back is a link back to .*Remove the link"):
        walk(root)


def test_two_links_at_each_other(root):
    (root / "b" / "to_c").symlink_to(root / "c")
    (root / "c" / "to_b").symlink_to(root / "b")
    with pytest.raises(ConfigError, match="is a link back to"):
        walk(root)


def test_a_folder_may_be_reached_twice_but_not_without_end(root):
    (root / "twice").symlink_to(root / "c")
    assert {"c/d/e", "twice/d/e"} <= set(names(root))
    before = root / "c"
    for i in range(8):  # 2^8 ways
        level = root / f"level{i}"
        level.mkdir()
        for side in "lr":
            (level / side).symlink_to(before)
        before = level
    with pytest.raises(ConfigError, match=rf"more than {VISITS} ways"):
        walk(root)


def test_what_has_no_end_or_no_beginning_is_named(root):
    (root / "gone").symlink_to(root / "nowhere")
    with pytest.raises(ConfigError, match=r"gone is a link that leads nowhere.*cp -rL"):
        walk(root)
    (root / "gone").unlink()
    (root / "itself").symlink_to("itself")
    with pytest.raises(ConfigError, match=r"itself is a link that leads nowhere"):
        walk(root)
    (root / "itself").unlink()
    os.mkfifo(root / "b" / "pipe")
    with pytest.raises(ConfigError, match=r"b/pipe is a pipe; only plain files"):
        walk(root)
    (root / "b" / "pipe").unlink()
    (root / "null").symlink_to("/dev/null")
    with pytest.raises(ConfigError, match=r"null is a device"):
        walk(root)
    with pytest.raises(ConfigError, match=r"root is a folder"):
        readable(root)


def test_a_socket_of_git_in_a_hidden_folder_is_nobodys_input(root, tmp_path, monkeypatch):
    (root / ".git").mkdir()
    (root / ".git" / "loop").symlink_to(root)
    (root / ".git" / "gone").symlink_to("nowhere")
    (root / ".git" / "index").touch()
    monkeypatch.chdir(root / ".git")  # addresses of sockets are short
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("ipc")
        assert names(root) == [".git/index", "a", "b/a", "b/z", "c/d/e"]
        (root / "ipc").symlink_to(".git/ipc")
        with pytest.raises(ConfigError, match="ipc is a socket"):
            walk(root)


def test_permission_is_named(root, monkeypatch):
    (root / "a").chmod(0)
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "a")  # root may read all
    with pytest.raises(ConfigError, match=r"/a can't be read: this user has no permission.*chmod"):
        walk(root)


def test_a_folder_without_permission(root, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(root), "iterdir", refuse)
    with pytest.raises(ConfigError, match=r"no permission"):
        walk(root)
