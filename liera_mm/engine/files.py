"""The files that a tool reads and writes: what keeps it from that, in two lines."""
import errno
from typing import Sequence

REFUSED = (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC,
           errno.EDQUOT, errno.ENAMETOOLONG)


def file_error(error: Exception) -> Sequence[str]:
    """What file the system refuses to read or write, and what to do; nothing if the error is another."""
    if getattr(error, 'errno', None) not in REFUSED:
        return ()
    path = error.filename2 or error.filename
    return (f'{path}: {error.strerror}' if path else error.strerror,
            'Give a path that is there, or can be written, with room on its disk')
