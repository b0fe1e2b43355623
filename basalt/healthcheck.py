"""Asks a service whether it is healthy, from inside its container, where there is no curl: exit code 0, or 1 and why.

`python -m basalt.healthcheck http://127.0.0.1:8080/healthz`, `grpc://127.0.0.1:50051`, or `celery://NAME` for the
worker NAME of this host.
"""

import os
import socket
import sys
import urllib.request
from urllib.parse import urlsplit

SECONDS = 5.0


def main() -> None:
    url = sys.argv[1]
    try:
        {"http": _http, "grpc": _grpc, "celery": _celery}[urlsplit(url).scheme](url)
    except Exception as error:  # whatever it is, it is not healthy
        sys.exit(f"{url}: {error}")


def _http(url: str) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    direct.open(url, timeout=SECONDS).close()


def _grpc(url: str) -> None:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(urlsplit(url).netloc, [("grpc.enable_http_proxy", 0)]) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # pyright: ignore[reportAttributeAccessIssue]
        reply = check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise RuntimeError("not serving")


def _celery(url: str) -> None:
    from celery import Celery

    node = f"{urlsplit(url).netloc}@{socket.gethostname()}"
    control = Celery(broker=os.environ["BASALT_REDIS_URL"]).control
    if not control.ping([node], timeout=SECONDS, limit=1):
        raise RuntimeError(f"{node} does not answer")


if __name__ == "__main__":
    main()
