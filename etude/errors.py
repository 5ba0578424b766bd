"""The errors a person meets, each with the exit code its script ends with.

Raise one of these for anything a person can mend; ``etude.cli.run`` prints it as one line, without a traceback.
The codes follow BSD's ``sysexits.h`` where it has a fitting one.
"""


class EtudeError(Exception):
    """Base of every error that is the input's or the machine's fault rather than a bug of Etude's."""

    exit_code = 1


class UsageError(EtudeError):
    """An option, or a combination of options, that cannot work."""

    exit_code = 2


class DataError(EtudeError):
    """Bad or missing data. The message begins with ``file:line:`` wherever there is a line to name."""

    exit_code = 65


class VerificationError(EtudeError):
    """A number is not what it must be: a loss that is not finite, an export whose logits differ."""

    exit_code = 70


class StorageError(EtudeError):
    """The disk is full, or reading or writing is not permitted."""

    exit_code = 74


class Interrupted(EtudeError):
    """A run was asked to stop; its state is saved, and the same command continues it."""

    exit_code = 75


class PeerLost(EtudeError):
    """Another process of the run does not answer; started again, the run goes on from the last checkpoint."""

    exit_code = 75


class MismatchError(EtudeError):
    """A checkpoint, tokenizer or configuration does not fit, or an earlier stage has not been run."""

    exit_code = 78
