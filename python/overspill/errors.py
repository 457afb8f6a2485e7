"""What overspill raises. Facts are attributes, not only text; one that does not apply is None."""

from __future__ import annotations


class OverspillError(Exception):
    """Anything that overspill reports.

    Attributes:
        tier: "device", "host" or "disk".
        requested_bytes: what was asked for.
        available_bytes: what there is.
        budget_bytes: the limit as it was stated.
        offset_bytes: where in a file.
        path: the file or folder.
        tensor: the tensor.
        expected_state: state id that a patch starts from.
        found_state: state id of the base that was given.
        session: the session.
        layer: the layer.
        tokens: tokens that a session would have.
        limit_tokens: the most that it can have.
    """

    tier: str | None = None
    requested_bytes: int | None = None
    available_bytes: int | None = None
    budget_bytes: int | None = None
    offset_bytes: int | None = None
    path: str | None = None
    tensor: str | None = None
    expected_state: str | None = None
    found_state: str | None = None
    session: str | int | None = None
    layer: int | None = None
    tokens: int | None = None
    limit_tokens: int | None = None

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        for name, fact in facts.items():
            setattr(self, name, fact)


class BudgetError(OverspillError):
    """A memory or disk budget is not a byte count, or cannot be kept."""


class FormatError(OverspillError):
    """A file or a buffer is not what it should be."""


class TransferError(OverspillError):
    """Bytes could not be moved; they are where they were."""


class DeviceError(OverspillError):
    """The device is missing, too old, or refused a call."""


class SessionError(OverspillError):
    """A session is not in a state that allows the call, or was given what it cannot take; it is as it was."""


class UnsupportedModelError(OverspillError):
    """A kind of model for which sessions have not been proved exact."""


class ServerError(OverspillError):
    """A server cannot start, or ended without doing all of its work."""


class RequestError(ServerError):
    """A server refused a request.

    Attributes:
        status: of HTTP; 0 where there was no answer.
        code: the server's word for it, such as "session_conflict".
        param: the parameter that is wrong.
        retry_after_s: when to try again, if the server said.
    """

    status: int = 0
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None
