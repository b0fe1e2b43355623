"""Every error a client can see, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

import math

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

RETRY_AFTER_SECONDS = 2


class APIError(Exception):
    """What was wrong and what would be right, with the status it is told under."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float = RETRY_AFTER_SECONDS,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after = retry_after  # seconds, of 429 and 503

    def body(self) -> dict[str, object]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(math.ceil(self.retry_after))} if self.status in (429, 503) else None
        return JSONResponse(self.body(), self.status, headers)


def bad_request(message: str, param: str | None = None, code: str = "invalid_value", status: int = 400) -> APIError:
    return APIError(status, message, param=param, code=code)


def unavailable(service: str, why: str = "is not available") -> APIError:
    return APIError(
        503,
        f"the {service} service {why}: try again in a few seconds",
        type="server_error",
        code=f"{service.replace(' ', '_')}_unavailable",
    )


def timed_out(service: str, seconds: float) -> APIError:
    return APIError(
        503,
        f"the {service} service did not answer within {seconds:g} seconds: try again, or ask for less",
        type="server_error",
        code=f"{service}_timeout",
    )


def failed(service: str) -> APIError:
    """The service is there and did something we cannot make sense of; its log says what."""
    return APIError(502, f"the {service} service failed on this request", type="server_error", code=f"{service}_failed")


def install(app: FastAPI, service: str) -> None:
    """Makes every error response of `app`, the face of `service`, one of the shape above."""

    async def api_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, APIError)
        return error.response()

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        told = {404: f"there is no {request.url.path} here", 405: f"{request.url.path} does not take {request.method}"}
        body = bad_request(told.get(error.status_code, str(error.detail)), code="unknown_url").body()
        return JSONResponse(body, error.status_code, error.headers)

    async def unexpected(_: Request, __: Exception) -> JSONResponse:
        message = f"the {service} failed on this request"
        return APIError(500, message, type="server_error", code="internal_error").response()

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
        return bad_request(f"{param or 'the request'}: {first['msg']}", param or None).response()

    app.add_exception_handler(APIError, api_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected)
