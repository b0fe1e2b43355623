"""What Prometheus is told by the vision service, at http://HOST:METRICS_PORT/metrics."""

from prometheus_client import Counter, Gauge, Histogram

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)

IMAGES = Counter("basalt_vision_images", "Images embedded, by what was there already.", ["assistant", "cached"])
ERRORS = Counter("basalt_vision_errors", "Requests refused or failed, by gRPC status.", ["status"])
STAGE = Histogram("basalt_vision_stage_seconds", "Time by stage of the work on an image.", ["stage"], buckets=SECONDS)
BATCH = Histogram("basalt_vision_batch_images", "Images in one pass of a tower.", buckets=(1, 2, 4, 8, 16, 32, 64))
BUSY = Gauge("basalt_vision_busy_requests", "Requests admitted and not answered yet.")
PROJECTORS = Gauge("basalt_vision_projectors", "Projectors loaded.")
