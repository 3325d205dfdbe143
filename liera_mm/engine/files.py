"""The files that a tool reads and writes: what keeps it from that, in two lines."""
import contextlib
import errno
import gc
import os.path as osp
from pathlib import Path
from typing import Iterator, Sequence

from ..core.errors import SetupError

REFUSED = (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC,
           errno.EDQUOT, errno.ENAMETOOLONG)


def file_error(error: Exception) -> Sequence[str]:
    """What file the system refuses to read or write, and what to do; nothing if the error is another."""
    if getattr(error, 'errno', None) not in REFUSED and not isinstance(error, FileNotFoundError):
        return ()
    path = error.filename2 or error.filename
    return (f'{path}: {error.strerror}' if path else error.strerror or str(error).splitlines()[-1],
            'Give a path that is there, or can be written, with room on its disk')


def check_out(outs: Sequence[Path], *inputs: str) -> None:
    """Raise a SetupError if a file that a tool would write is one that it reads."""
    read = {osp.realpath(path) for path in inputs}
    overwritten = [path for path in outs if osp.realpath(path) in read]
    if overwritten:
        raise SetupError(f'{overwritten[0]} is read, and would be overwritten', 'Give another name as OUT')


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """A context in which Python does not look at millions of lists again and again, whenever there are new ones."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
