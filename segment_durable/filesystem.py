"""What filesystem an outbox is to lie on, and whether SQLite's WAL mode is possible there.

The processes of an outbox share memory that is mapped from a file, and each tells from the kernel's locks who is alive.
Both end at the host.  Several hosts can share a network filesystem; with two of them on the same files the database is
damaged, and SQLite notices nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from segment_durable.errors import OutboxUnavailable

__all__ = ["check_filesystem", "filesystem_type", "mapping_problem"]

MOUNTS = "/proc/self/mountinfo"

# 9p, virtiofs, vboxsf and their like are not among them: with these one virtual machine has a folder of its host's, and
# in gVisor all that a container has is 9p.  All processes of the outbox are on one kernel there; where that can't map a
# shared file (9p without a cache) or can't lock one, SQLite and the lock file say so.
_SHARED = frozenset(
    (
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "auristorfs", "coda", "davfs"),
        *("ceph", "lustre", "glusterfs", "gpfs", "beegfs", "pvfs2", "panfs", "wekafs"),
        *("gfs2", "ocfs2", "acfs"),  # on a disk that several hosts have
        *(
            f"fuse.{name}"
            for name in (
                *("sshfs", "curlftpfs", "davfs", "smbnetfs", "glusterfs", "ceph", "ceph-fuse", "mfs", "lizardfs"),
                *("s3fs", "goofys", "mount-s3", "gcsfuse", "blobfuse", "blobfuse2", "rclone", "juicefs", "seaweedfs"),
            )
        ),
    )
)


def check_filesystem(path: Path) -> None:
    """Raise `OutboxUnavailable` if `path` is to lie on a network filesystem; it need not be there yet.

    Only Linux tells.  What can't be found out is no reason to refuse.
    """
    try:
        # Of the file and not of its folder: a folder is mounted by systemd or autofs when one looks into it.
        real = os.path.realpath(path)
        with open(MOUNTS, "rb") as file:
            mounts = os.fsdecode(file.read())
    except (OSError, ValueError):
        return
    kind = filesystem_type(real, mounts)
    if kind in _SHARED:
        raise OutboxUnavailable(
            path.parent,
            f"is on a network filesystem ({kind}), where hosts would damage each other's outbox: "
            "set outbox_dir to a folder on a local disk",
        )


def filesystem_type(path: str, mounts: str) -> str:
    """The type of the filesystem that the absolute `path` is on, by the text of /proc/self/mountinfo; "" if unknown."""
    above = [mount for mount in map(_parse, mounts.split("\n")) if mount and _is_below(path, mount[2])]
    # The way that the kernel takes, from mount to mount: the longest of the mount points may be hidden below another.
    numbers = {number for number, _, _, _ in above}
    following = [mount for mount in above if mount[1] == mount[0] or mount[1] not in numbers]
    kind = ""
    while following:
        found = min(following, key=lambda mount: len(mount[2]))
        kind = found[3]
        above.remove(found)
        following = [mount for mount in above if mount[1] == found[0]]
    return kind


def mapping_problem(folder: Path) -> str:
    """Why no memory can be shared by a file in `folder`; "" if it can be, or if no file can be made there.

    For after SQLite's "disk I/O error", which has no more to say, and before Python 3.11 no result code either.
    """
    import mmap
    import tempfile

    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(mmap.PAGESIZE)
        try:
            mmap.mmap(file.fileno(), mmap.PAGESIZE).close()
        except OSError as problem:
            return problem.strerror or str(problem)
    return ""


def _parse(line: str) -> tuple[str, str, str, str] | None:
    """A mount's number, that of the one it is mounted on, its path and its type; None if the line makes no sense."""
    own, separator, rest = line.partition(" - ")
    fields, kind = own.split(" "), rest.split(" ")[0]
    if not separator or len(fields) < 6 or not kind:
        return None
    return fields[0], fields[1], re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4]), kind


def _is_below(path: str, point: str) -> bool:
    return path == point or path.startswith(point.rstrip("/") + "/")
