"""What the endpoint refuses, in OpenAI's error format and our sentences."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from lensmith.errors import LensmithError


class Refused(LensmithError):
    """A request that is not answered; the message says where, what and the way out."""

    def __init__(
        self,
        status: int,
        code: str,
        sentence: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """`status`: of HTTP; `code`: a stable name for programs; `param`: the field of the request that is meant."""
        super().__init__(sentence)
        self.status, self.code, self.param, self.headers = status, code, param, headers

    def to_json(self) -> dict[str, Any]:
        """As the OpenAI API writes errors, whose clients show `message`."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.to_json(), self.status, headers=self.headers)
