"""The errors qdora raises on purpose.

    QDoRAError                   a person can act on it: the command line prints its text and exits with 2
      ├─ ConfigError             a flag, a config file or an argument is wrong
      ├─ CheckpointError         a model or adapter directory is missing, damaged or of the wrong kind
      ├─ DataError               a data file is missing, unreadable or not in a known layout
      ├─ OutputError             what was to be written could not be: the disk is full, read-only or gone
      └─ NumericsError           a number came out that must not be trusted (not finite, overflow)

Every message says what was wrong, what was found and what to do. Anything else that escapes is a bug and
keeps its traceback.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "NumericsError",
    "OutputError",
    "QDoRAError",
    "out_of_memory",
    "reason",
    "shown",
]

_LONGEST_MESSAGE = 2_000


class QDoRAError(Exception):
    """Base of every error that is the input's doing rather than the program's.

    Args:
        message: may quote somebody's file; what is too long for a screen is cut.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(message if len(message) <= _LONGEST_MESSAGE else f"{message[: _LONGEST_MESSAGE - 1]}…")


class ConfigError(QDoRAError):
    """A flag, a config file or an argument is wrong."""


class CheckpointError(QDoRAError):
    """A model or adapter directory is missing, damaged or of the wrong kind."""


class DataError(QDoRAError):
    """A data file is missing, unreadable or not in a known layout."""


class OutputError(QDoRAError):
    """What was to be written could not be: the disk is full, read-only or gone."""


class NumericsError(QDoRAError):
    """A number came out that must not be trusted."""


def reason(error: BaseException) -> str:
    """What another library's error says, on one line, to be quoted in one of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"


_SIGNS_OF_FULL_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed", "bad_alloc")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or on the host; torch says it in more than one way."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS_OF_FULL_MEMORY)


def shown(value: object) -> str:
    """A value out of somebody's file, to be quoted: its `repr`, as far as a line has room for it."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
