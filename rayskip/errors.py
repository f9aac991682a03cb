"""Every error rayskip raises on purpose.

    RayskipError
    ├── UserError            the caller must change something      exit 2
    │   ├── ConfigError      a key, a value or a file of the config
    │   ├── InputError       the dataset: path, format, column
    │   ├── ModelError       the checkpoint: missing, unsafe, unknown family
    │   └── OutputError      the output folder: another job's, corrupt, not writable
    ├── JobFailed            the job gave up, or no row succeeded   exit 1
    ├── TakenOver            another run has the output folder now  exit 3
    ├── Interrupted          stopped by a signal; the same command resumes   exit 75
    ├── Retryable            the same work may succeed elsewhere or later
    │   ├── ReplicaLost      the replica's process died or hangs
    │   └── StorageBusy      the store answered with a passing fault
    └── RowError             one row is bad; it becomes an error row

Whether something is worth a retry is a type, never a string match.
"""


class RayskipError(Exception):
    """Root of the tree; `exit_code` is what the command line leaves with."""

    exit_code = 1


class UserError(RayskipError):
    """The caller must change something; the message says what and where."""

    exit_code = 2


class ConfigError(UserError):
    """A key, a value or the file of a config."""


class InputError(UserError):
    """The dataset: path, format, column."""


class ModelError(UserError):
    """The checkpoint: missing, unsafe or of an unknown family."""


class OutputError(UserError):
    """The output folder: another job's, corrupt or not writable."""


class JobFailed(RayskipError):
    """The job gave up, or nothing succeeded: too many failed rows, or a shard that keeps killing replicas."""


class TakenOver(RayskipError):
    """Another run has the output folder now; starting this one again would only take it back."""

    exit_code = 3


class Interrupted(RayskipError):
    """Stopped by a signal; finished shards are committed, the same command resumes."""

    exit_code = 75


class Retryable(RayskipError):
    """The same work may succeed on another replica or a little later."""


class ReplicaLost(Retryable):
    """A replica's process died, or stopped answering."""


class StorageBusy(Retryable):
    """The store answered with a passing fault (throttled, reset, timed out)."""


class RowError(RayskipError):
    """One row is bad. `kind` is the output's error_type, the message its error_message."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def shown(value: object) -> str:
    """A value as messages have it: on one line, and not long."""
    text = repr(value) if isinstance(value, str) else str("null" if value is None else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def kind_of(value: object) -> str:
    """The type of a Python object that is of a wrong one, by its full name."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def plain(text: str, keep: str = "") -> str:
    """Text from the data as a terminal may have it: with escapes for what is not printable, but for the characters
    to `keep`."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def counted(number: float, noun: str) -> str:
    """A number of things: "1 row", "2,000 rows", "2 retries", "0.5 CPUs"."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    amount = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{amount} {noun if number == 1 else plural}"


def first_line(error: BaseException) -> str:
    """An error of a library, short enough to stand in one of ours; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
