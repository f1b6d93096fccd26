"""Network filesystems: refused when a client is made, by the types of the mounts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segment_durable import Client, filesystem
from segment_durable.errors import OutboxUnavailable
from segment_durable.filesystem import check_filesystem, filesystem_type

MOUNTS = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 259:0 / / rw,relatime shared:1 master:2 - ext4 /dev/root rw
40 27 0:50 / /srv rw,relatime - nfs4 server:/export rw,vers=4.2
41 40 259:1 / /srv/local/disk rw,relatime - xfs /dev/sdb rw
42 27 0:51 / /mnt/two\040words\134\011\012 rw,relatime - fuse.sshfs me@host: rw
43 27 0:52 / /srv-not rw,relatime - btrfs /dev/sdc rw
44 27 0:53 / /home rw,relatime - autofs systemd-1 rw
45 44 0:54 / /home rw,relatime - cifs //server/home rw
46 45 0:55 / /home/user rw,relatime - nfs server:/user rw
47 45 0:56 / /home rw,relatime - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/var/lib/outbox", "ext4"),
        ("/srv", "nfs4"),
        ("/srv/outbox/outbox.db", "nfs4"),
        ("/srv/local", "nfs4"),
        ("/srv/local/disk/outbox.db", "xfs"),
        ("/srv-not/outbox.db", "btrfs"),
        ("/srvx", "ext4"),
        ("/mnt/two words\\\t\n/outbox.db", "fuse.sshfs"),
        ("/mnt/two words/outbox.db", "ext4"),
        ("/home/other/outbox.db", "tmpfs"),
    ],
)
def test_the_type_is_that_of_the_nearest_mount_above(path: str, kind: str) -> None:
    assert filesystem_type(path, MOUNTS) == kind
    assert filesystem_type(path, "\n".join(reversed(MOUNTS.split("\n")))) == kind


def test_a_mount_that_is_hidden_below_a_later_one_is_not_it() -> None:
    assert filesystem_type("/home/user/outbox.db", MOUNTS) == "tmpfs"


def test_where_the_root_is_not_among_the_mounts_those_below_it_are_found() -> None:
    without_root = "".join(line + "\n" for line in MOUNTS.splitlines() if " / / " not in line)
    assert filesystem_type("/var/outbox.db", without_root) == ""
    assert filesystem_type("/srv/outbox.db", without_root) == "nfs4"
    assert filesystem_type("/srv/local/disk/outbox.db", without_root) == "xfs"


def test_a_root_that_is_mounted_on_itself_is_found() -> None:
    assert filesystem_type("/srv/x", "1 1 0:1 / / rw - rootfs rootfs rw\n2 1 0:2 / /srv rw - ceph a:/ rw") == "ceph"


@given(st.text(alphabet="12 -/a\\04\n:,") | st.text())
def test_no_text_makes_it_fail(text: str) -> None:
    assert isinstance(filesystem_type("/a/a", text), str)
    assert isinstance(filesystem_type("/a/a", f"{MOUNTS}{text}\n{MOUNTS}"), str)


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Says that a folder of ours is on a filesystem of that type."""

    def say(kind: str, name: str = "mounted") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        escaped = os.path.realpath(folder).replace("\\", "\\134").replace(" ", "\\040")
        text = f"27 1 259:0 / / rw - ext4 /dev/root rw\n40 27 0:50 / {escaped} rw,relatime - {kind} source rw\n"
        (tmp_path / "mountinfo").write_bytes(text.encode() + b"\xff\n")
        monkeypatch.setattr(filesystem, "MOUNTS", str(tmp_path / "mountinfo"))
        return folder

    return say


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "fuse.glusterfs", "fuse.s3fs"])
def test_a_client_is_refused_on_a_network_filesystem(
    make_client: Callable[..., Client], mounts: Callable[..., Path], kind: str
) -> None:
    folder = mounts(kind, "a share")
    with pytest.raises(OutboxUnavailable) as caught:
        make_client(outbox_dir=folder / "new" / "outbox")
    assert f"({kind})" in str(caught.value)
    assert "set outbox_dir to a folder on a local disk" in str(caught.value)
    assert list(folder.iterdir()) == [], "something was made there"


def test_a_link_to_a_network_filesystem_is_followed(
    make_client: Callable[..., Client], mounts: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(mounts("nfs4"))
    with pytest.raises(OutboxUnavailable, match="nfs4"):
        make_client(outbox_dir=tmp_path / "link" / "outbox")


@pytest.mark.parametrize("kind", ["ext4", "overlay", "tmpfs", "9p", "virtiofs", "fuse.unheard-of", "nfsd"])
def test_a_client_is_let_onto_every_other_filesystem(
    make_client: Callable[..., Client], mounts: Callable[..., Path], kind: str
) -> None:
    assert make_client(outbox_dir=mounts(kind) / "outbox").track("u", "e")[0]


def test_it_is_looked_up_when_an_outbox_is_opened_and_by_no_call(
    make_client: Callable[..., Client], mounts: Callable[..., Path]
) -> None:
    folder = mounts("ext4")
    with make_client(outbox_dir=folder / "outbox") as client:
        mounts("nfs4")
        assert client.track("u", "e")[0]
        assert client.flush(30)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0 - \n", b"- - - -\n" * 3, None], ids=repr)
def test_odd_or_missing_mounts_are_no_reason_to_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "mountinfo").write_bytes(content)
    monkeypatch.setattr(filesystem, "MOUNTS", str(tmp_path / "mountinfo"))
    check_filesystem(tmp_path / "outbox" / "outbox.db")
