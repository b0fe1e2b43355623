import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from tests.ui.gateway_shaped import GatewayShaped


@pytest.fixture
def gateway() -> Iterator[GatewayShaped]:
    shaped = GatewayShaped()
    server = uvicorn.Server(uvicorn.Config(shaped.app(), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    shaped.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield shaped
    server.should_exit = True
    thread.join()
