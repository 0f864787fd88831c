"""Errors of the HTTP server in OpenAI's format. Texts of libraries, which may hold data of others, stay in the log."""

from __future__ import annotations

from typing import Any

from mm_moslora.utils.errors import MoSLoRAError


class ApiError(MoSLoRAError):
    """A request that gets an error instead of an answer."""

    def __init__(
        self, message: str, *, status: int = 400, code: str = "invalid_value", param: str | None = None,
        retry_after: int | None = None,
    ) -> None:  # fmt: skip
        self.message, self.status, self.code, self.param = message, status, code, param
        self.retry_after = retry_after
        super().__init__(message)

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        named = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        return named.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """The JSON object that the client gets."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def busy(what: str, *, seconds: int = 1) -> ApiError:
    """The server is at capacity; the client should retry later."""
    return ApiError(
        f"The server is busy: {what}. Send the request again after {seconds} s.",
        status=429, code="overloaded", retry_after=seconds,
    )  # fmt: skip


def stopping() -> ApiError:
    """The server ends before the answer does."""
    return ApiError("The server is stopping.", status=503, code="stopping", retry_after=5)


def internal(request_id: str) -> ApiError:
    """An internal error; the log has the details."""
    return ApiError(
        f"The server could not answer this request. Its log has the reason under {request_id}.",
        status=500, code="internal_error",
    )  # fmt: skip


def client_left() -> ApiError:
    """The client has disconnected; only the log shows it."""
    return ApiError("The client disconnected.", status=499, code="client_left")
