"""What stands around vLLM's server: the paths that are open (it has others, which take tensors or token ids unchecked),
and a log line for each request.
"""

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from basalt.api_requests import Requests

OPEN = {
    "/health",
    "/metrics",
    "/version",
    "/tokenize",
    "/detokenize",
    "/v1/models",
    "/v1/chat/completions",
    "/v1/completions",
}


class OpenPaths:
    """ASGI middleware: everything else is a 404 with an OpenAI error body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            error = {
                "message": f"there is no {scope['path']} here; open are {', '.join(sorted(OPEN))}",
                "type": "NotFoundError",
                "param": None,
                "code": 404,
            }
            await JSONResponse({"error": error}, status_code=404)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class LLMRequests(Requests):
    """vLLM makes its middleware of the application alone."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app, "llm")
