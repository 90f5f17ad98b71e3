"""The errors a user can meet. Each message says what, the value got, and what to do."""

import errno


class MegarqError(ValueError):
    """Base of every error that the user, not the programmer, can mend."""


class ConfigError(MegarqError):
    """A configuration, an option or a combination of them that cannot be run."""


class TooLittleMemoryError(MegarqError):
    """More is asked for at once than this rank's device holds."""


class DataError(MegarqError):
    """Images, captions, code shards or tokenizers that are missing, damaged or do not fit each other."""


class LostDataError(DataError):
    """More samples of training than is allowed cannot be read any more; the same on all ranks."""


class StorageError(MegarqError):
    """Files that were there when a run started, and that this rank cannot read any more; a restart may help."""


class DivergenceError(MegarqError):
    """A loss or gradient in training that is not a finite number any more; the same on all ranks."""


class CheckpointError(MegarqError):
    """A checkpoint or exported model that is missing, incomplete, damaged or of another model."""


class PreflightError(MegarqError):
    """A check before the first step that failed by what a person must mend; the same on all ranks."""


class FaultError(MegarqError):
    """Something that the machine did and not the user: a restart from the last checkpoint, elsewhere if it comes again,
    may be all that it takes."""


class RunHeldError(FaultError):
    """Another job trains into the run's folder; it may be one that is about to end."""


_FOR_A_PERSON = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.EEXIST),
        *(errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.EXDEV),
        *(errno.EMFILE, errno.ENOSYS, errno.EOPNOTSUPP),
    }
)
"""Errors of the system that the next attempt would meet again; others, EIO or ESHUTDOWN of a storage, may be gone."""


def is_fault(error: MegarqError | OSError) -> bool:
    """Whether a restart may help, so that no person need mend anything first."""
    if isinstance(error, OSError):
        return error.errno is not None and error.errno not in _FOR_A_PERSON
    return isinstance(error, FaultError | StorageError)


class Stopped(Exception):  # noqa: N818 - it is no error
    """A run that was asked to stop, has saved, and goes on when it is started again; the same on all ranks."""
