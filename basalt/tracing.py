"""OpenTelemetry traces: off, and nothing loaded for them, until OTEL_EXPORTER_OTLP_ENDPOINT names a collector.

A span tells its name, its times, and names and numbers of ours. No prompt, no answer, no image, no URL, no key and no
error's message is told: of an error its type alone. All else is OpenTelemetry's own environment: OTEL_TRACES_SAMPLER,
OTEL_EXPORTER_OTLP_HEADERS, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, …
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

Kind = Literal["internal", "server", "client", "consumer"]  # in OpenTelemetry's sense

PROTOCOL = "http/protobuf"
FLUSH_SECONDS = 3.0  # that a collector has to take what is left when a service ends

_tracer: Tracer | None = None
_provider: Any = None


def endpoint() -> str | None:
    """Where spans are sent; None where tracing is off.

    Raises:
        ValueError: the environment asks for another protocol than the one that is spoken here.
    """
    every, traces = (os.environ.get(f"OTEL_EXPORTER_OTLP_{name}") for name in ("ENDPOINT", "TRACES_ENDPOINT"))
    switched_off = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if switched_off or os.environ.get("OTEL_TRACES_EXPORTER") == "none" or not (every or traces):
        return None
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if os.environ.get(name, PROTOCOL) != PROTOCOL:
            raise ValueError(f"{name} must be {PROTOCOL}: name the collector's HTTP port, mostly 4318")
    return traces or f"{(every or '').rstrip('/')}/v1/traces"


def begin(service: str) -> None:
    """Once in a process, before what is to be traced.

    Raises:
        ValueError: see `endpoint`.
    """
    global _tracer, _provider
    if (where := endpoint()) is None:
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME") or f"basalt-{service}"})
    _provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # it would wait half a minute: see `flush`
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=where)))
    _tracer = _provider.get_tracer("basalt")


def flush() -> None:
    """Sends what has ended and is not sent yet; a collector that does not answer is not waited for."""
    if _provider is not None:
        sending = threading.Thread(target=_provider.force_flush, daemon=True)
        sending.start()
        sending.join(FLUSH_SECONDS)


class Span:
    """A part of the way. As a context manager, what happens inside belongs to it; or it is ended by `end`."""

    __slots__ = ("_span", "_token")

    def __init__(self, span: Any) -> None:
        self._span = span  # None where tracing is off
        self._token: Any = None

    def name(self, name: str) -> None:
        if self._span is not None:
            self._span.update_name(name)

    def told(self, **attributes: str | int | float) -> None:
        """Adds what was not known at its beginning."""
        if self._span is not None:
            self._span.set_attributes(attributes)

    def failed(self, kind: str) -> None:
        """It did not do what it was to do."""
        if self._span is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_attribute("error.type", kind)
            self._span.set_status(StatusCode.ERROR)

    def headers(self) -> dict[str, str]:
        """W3C's traceparent (and tracestate), with which another process goes on below this span."""
        return {} if self._span is None else _headers_within(_within(self))

    def end(self) -> None:
        if self._span is not None:
            self._span.end()

    def __enter__(self) -> Self:
        if self._span is not None:
            from opentelemetry import context

            self._token = context.attach(_within(self))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._span is not None:
            from opentelemetry import context

            context.detach(self._token)
            if kind is not None:
                self.failed(kind.__name__)
            self._span.end()


OFF = Span(None)


def span(
    name: str,
    kind: Kind = "internal",
    parent: Span | Mapping[str, str] | None = None,
    **attributes: str | int | float,
) -> Span:
    """Begins a span.

    Args:
        parent: a span of this process, or headers that came from another; by default what is current here.
    """
    if _tracer is None:
        return OFF
    from opentelemetry.trace import SpanKind

    return Span(
        _tracer.start_span(name, _within(parent), kind=SpanKind[kind.upper()], attributes=attributes)  # pyright: ignore[reportArgumentType]
    )


def on() -> bool:
    return _tracer is not None


def current() -> Span:
    """What is current here, to be the parent of what goes on elsewhere."""
    if _tracer is None:
        return OFF
    from opentelemetry.trace import get_current_span

    return Span(get_current_span())


def headers() -> dict[str, str]:
    """Those of the current span."""
    return {} if _tracer is None else _headers_within(None)


def trace_id() -> str:
    """Of the current span; empty where there is none."""
    if _tracer is None:
        return ""
    from opentelemetry.trace import format_trace_id, get_current_span

    told = get_current_span().get_span_context()
    return format_trace_id(told.trace_id) if told.is_valid else ""


def _within(parent: Span | Mapping[str, str] | None) -> Any:
    """OpenTelemetry's context below a parent; None stands for the current one."""
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if isinstance(parent, Span):
        return set_span_in_context(parent._span)
    return None if parent is None else TraceContextTextMapPropagator().extract(parent)


def _headers_within(within: Any) -> dict[str, str]:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, within)
    return carrier
