"""Errors that a user can act on: one line, naming what is wrong, where, and what to do.

The command line prints them as ``error: ...`` and exits with their ``exit_status``; every other exception is a
defect of this package and keeps its traceback.
"""

_MAX_LETTERS = 2000


class ScaleFoldError(Exception):
    """Base of all errors caused by input, configuration or environment."""

    exit_status = 2

    def __str__(self) -> str:
        """The message as one printable line, whatever the file that it quotes holds."""
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())
        return text if len(text) <= _MAX_LETTERS else f"{text[:_MAX_LETTERS]}..."


class ConfigError(ScaleFoldError):
    """A configuration file has an unknown key, a wrong type or an impossible combination."""


class KernelError(ScaleFoldError):
    """A compiler made a kernel whose results would be wrong."""


class DataError(ScaleFoldError):
    """A raw file, a store or a sample is missing, malformed or inconsistent."""


class CheckpointError(ScaleFoldError):
    """A checkpoint has the wrong hash, layout, names or shapes."""


class LogError(ScaleFoldError):
    """An MLPerf log or result folder cannot be read or breaks a rule."""


class TrainingError(ScaleFoldError):
    """Training cannot continue, for example because a loss is not finite."""


class RankLostError(ScaleFoldError):
    """A rank of the run was killed, failed or stands still, so that the others cannot continue."""

    exit_status = 5


class DeviceError(ScaleFoldError):
    """A GPU has failed under this process, which cannot use it any more."""
