"""Every exception and warning that autochunk lets its callers see.

Callers catch by family; a second base keeps ``except ValueError`` and ``except OSError`` working::

    AutochunkError
    ├── ArgumentError (ValueError)     an argument of the op, the module or the tuner is not usable
    ├── WorkloadError (ValueError)     a workload or shape text that cannot be read
    ├── DeviceError (RuntimeError)     the device asked for is not there
    ├── StoreError (OSError)           the profile store cannot be read or written
    ├── BundleError (ValueError)       a file of profiles is not what it should be
    ├── AgreementError (RuntimeError)  the processes of a program have no profiles in common
    ├── StorageError (RuntimeError)    the storage that machines tune through cannot be used
    ├── ProbeError (RuntimeError)      the measuring process cannot be started or understood
    └── ReportError (RuntimeError)     a report or a plot cannot be drawn

    AutochunkWarning (UserWarning)
    ├── MissWarning                    "auto" found no profile; names the command that makes one
    ├── BudgetWarning                  no plan that was measured fits the memory budget
    ├── StaleWarning                   "auto" used a profile that may no longer hold
    └── StoreWarning                   a layer or rows of a store were left out, or a store mended
"""

__all__ = [
    "AgreementError",
    "ArgumentError",
    "AutochunkError",
    "AutochunkWarning",
    "BudgetWarning",
    "BundleError",
    "DeviceError",
    "MissWarning",
    "ProbeError",
    "ReportError",
    "StaleWarning",
    "StorageError",
    "StoreError",
    "StoreWarning",
    "WorkloadError",
]


class AutochunkError(Exception):
    """Base of all errors that autochunk raises on purpose."""


class ArgumentError(AutochunkError, ValueError):
    """An argument is not usable: says what was required and what was received."""


class WorkloadError(AutochunkError, ValueError):
    """A workload or shape text cannot be read, or describes no possible attention."""


class DeviceError(AutochunkError, RuntimeError):
    """The device asked for is not there or cannot be described."""


class StoreError(AutochunkError, OSError):
    """The profile store cannot be read or written; nothing already stored was changed."""


class BundleError(AutochunkError, ValueError):
    """A file of profiles is not a bundle, or not one that this version reads."""


class AgreementError(AutochunkError, RuntimeError):
    """The processes of one program do not agree on the profiles that answer "auto".

    They would compile different programs, and then wait for each other without end.
    """


class StorageError(AutochunkError, RuntimeError):
    """The storage that machines tune through cannot be reached, or is not what it should be."""


class ProbeError(AutochunkError, RuntimeError):
    """The measuring process cannot be started, or answers what it should not."""


class ReportError(AutochunkError, RuntimeError):
    """A report or a plot cannot be drawn: what draws it is not installed, or there is nothing."""

    @classmethod
    def missing(cls, library: str) -> "ReportError":
        """The error where a library of the extra ``report`` is missing."""
        return cls(f"{library} is not installed: pip install 'autochunk[report]' brings it")


class AutochunkWarning(UserWarning):
    """Base of all warnings that autochunk gives."""


class MissWarning(AutochunkWarning):
    """No profile was found for a workload; the text has the command that makes one.

    A process warns once for all workloads that differ only in sizes.
    """


class BudgetWarning(AutochunkWarning):
    """No plan that was measured of a workload fits the memory budget.

    The text says how much memory the smallest plan takes.
    """


class StaleWarning(AutochunkWarning):
    """A profile was used that was measured with other versions, or another allocator."""


class StoreWarning(AutochunkWarning):
    """Profiles could not be read.

    A layer or some rows were left out, or a damaged store was set aside and its whole rows rescued.
    """
