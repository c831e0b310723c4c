"""The exceptions of sdvino: one tree, every message one sentence that says what to do next."""

from __future__ import annotations


class SdvinoError(Exception):
    """Something failed while doing what was asked. The command line exits with 1."""

    exit_code = 1


class RequestError(SdvinoError, ValueError):
    """What was asked cannot be done as asked. The command line exits with 2."""

    exit_code = 2


class ModelFolderError(RequestError):
    """A model folder is missing, damaged, or says things about itself that are not so."""


class DeviceError(RequestError):
    """A device is not there, or does not take what was asked of it."""


class OutputError(RequestError):
    """A file or folder cannot be written where it was asked for."""


class Cancelled(SdvinoError):
    """The person at the keyboard, or a callback, stopped the work; nothing stays half-written."""

    exit_code = 130


def said_by(error: BaseException) -> str:
    """Return the kind of ``error`` and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
