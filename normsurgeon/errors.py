"""Everything that normsurgeon raises on purpose.

    NormSurgeonError                 the root: catch this one to catch them all
    ├── UsageError                   the request itself is wrong          (exit code 2)
    │   ├── TargetError              unknown norm, groups that do not divide
    │   └── PatternError             a glob that matches no layer
    ├── EnvironmentProblem           the installation cannot work
    ├── LoadingError                 a model could not be made or found
    │   └── WeightsUnavailableError  the model is known, its weights are out of reach
    ├── CheckpointError              a file that is not, or not entirely, a checkpoint
    ├── WriteError                   a file that cannot be written
    ├── TracingError                 the model could not be followed
    ├── ConversionError              the surgery could not be done
    ├── AnalysisStopped              a signal asked it to stop            (exit code 130, 143)
    ├── DataError                    no images, or none that can be read
    ├── ProcessError                 another of the processes that share the work failed
    └── TrainingError                a training run that diverged, or cannot go on
        ├── DivergedError            the loss ceased to be finite
        └── TrainingStopped          a signal asked it to stop            (exit code 130, 143)

Every message is one line: what went wrong, where, and what to try.
"""

from __future__ import annotations

from typing import Any

from normsurgeon.printable import one_short_line

STOPPED = {"SIGINT": 130, "SIGTERM": 143}
"""What a process that a signal stopped leaves with, as shells count: 128 and the signal's number."""


class NormSurgeonError(Exception):
    """The root of the hierarchy; ``exit_code`` is what the command line leaves with."""

    exit_code = 1


class UsageError(NormSurgeonError):
    """The request itself is wrong: nothing was attempted."""

    exit_code = 2


class TargetError(UsageError):
    """A target norm that does not exist, or cannot be built as asked."""


class PatternError(UsageError):
    """A glob pattern that matches no norm layer of the model."""


class EnvironmentProblem(NormSurgeonError):
    """The installed libraries cannot work together."""


class LoadingError(NormSurgeonError):
    """A model could not be created or found."""


class WeightsUnavailableError(LoadingError):
    """The architecture is known, but its pretrained weights are out of reach."""


class CheckpointError(NormSurgeonError):
    """A checkpoint file that cannot be read, or made to fit.

    Such a message quotes the file, which may hold anything: it is one printable line of at most 300 characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_short_line(message))


class WriteError(NormSurgeonError):
    """A file that cannot be written: a missing folder, a full disk, no permission."""


class TracingError(NormSurgeonError):
    """The model's data flow could not be followed."""


class ConversionError(NormSurgeonError):
    """The surgery could not be carried out as planned."""


class DataError(NormSurgeonError):
    """A data source that holds nothing to work on."""


class ProcessError(NormSurgeonError):
    """Another of the processes that share the work failed, or is gone."""


class TrainingError(NormSurgeonError):
    """A training run that diverged, or cannot go on."""


class DivergedError(TrainingError):
    """A training run whose loss ceased to be finite."""


class AnalysisStopped(NormSurgeonError):
    """An analysis that a signal asked to stop; ``report`` is the Report of what was done until then."""

    def __init__(self, message: str, signal: str | None, report: Any) -> None:
        super().__init__(message)
        self.signal = signal
        self.report = report
        self.exit_code = STOPPED.get(signal or "", 130)


class TrainingStopped(TrainingError):
    """A training run that a signal asked to stop; what it had done is saved where it has a folder."""

    def __init__(self, message: str, signal: str | None = None) -> None:
        super().__init__(message)
        self.signal = signal
        self.exit_code = STOPPED.get(signal or "", 130)
