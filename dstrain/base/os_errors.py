"""What to do about an error of the operating system: one sentence for each errno, said the same way everywhere."""

import errno
import os

_REMEDIES = {
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "free some space, or ask for a larger quota",
    errno.EFBIG: "the file system or `ulimit -f` allows no larger file: raise that limit, or write elsewhere",
    errno.EROFS: "write elsewhere, or have the file system mounted for writing",
    errno.EACCES: "correct the permissions of the file and of the folders above it",
    errno.EPERM: "correct the file's owner and attributes, or write elsewhere",
    errno.ESTALE: "the file was removed or replaced on the NFS server: start again, or have it mounted anew",
    errno.EIO: "the disk or the network file system fails: look at the kernel's log of that host",
    errno.EMFILE: "raise `ulimit -n`",
    errno.ENFILE: "end other programs on this machine, or raise the sysctl fs.file-max",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: "correct the path",
    errno.ENOTDIR: "a part of the path is a file and no folder: correct the path",
    errno.EISDIR: "give a file",
    errno.EEXIST: "give another name, or remove what is there",
    errno.ELOOP: "a symbolic link leads back to itself: correct it",
    errno.ENOTEMPTY: "give another folder, or empty it",
    errno.ENOMEM: "end other programs, or ask for more memory",
    errno.ETIMEDOUT: "look after the file system or the network, then start again",
    errno.ENODEV: "this file system cannot map files into memory: copy the file to another one",
}


def explain_os_error(error: OSError, path: object = None, remedy: str | None = None) -> str:
    """One line: which path, what is wrong, what to do.

    Args:
        error: what the system or a storage answered.
        path: what was read or written; the error's own where it is not given.
        remedy: what to do, where the caller knows that better than the errno does.
    """
    where = path if path is not None else error.filename
    reason = error.strerror or str(error) or type(error).__name__
    # A storage, or gzip, says more than the errno that it borrows.
    is_of_system = error.errno is not None and reason == os.strerror(error.errno)
    advice = remedy or (_REMEDIES.get(error.errno or 0) if is_of_system else None)
    return (f"{where}: " if where is not None else "") + reason + (f"; {advice}" if advice else "")
