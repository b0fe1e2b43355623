"""Celery, the transport: a message says that a job may be worked on, and the state of record says whether it is so.

So a message that is lost is sent again, and one that comes twice, or for a job that somebody works on, is nothing.
Messages are acknowledged on receipt: no visibility timeout can hand a long job to a second worker.
"""

from multiprocessing import Event
from typing import Any

from celery import Celery
from celery.signals import worker_shutting_down

stopping = Event()  # made before the pool forks: its processes see that the worker was asked to stop


class Queue:
    """The messages for jobs of one kind.

    Attributes:
        app: Celery's; a worker registers a task of the name `task`.
    """

    def __init__(self, kind: str, redis_url: str) -> None:
        self.kind, self.task = kind, f"basalt.{kind}"
        self.app = Celery(f"basalt-{kind}", broker=redis_url)
        self.app.conf.update(
            task_default_queue=kind,
            task_ignore_result=True,
            task_acks_late=False,
            worker_prefetch_multiplier=1,
            worker_disable_prefetch=True,  # a worker that is busy keeps no message that another could take
            worker_concurrency=1,  # one job at a time; start more workers for more
            worker_send_task_events=False,
            broker_connection_retry_on_startup=True,
            broker_transport_options={"socket_timeout": 5, "socket_connect_timeout": 5},
            task_publish_retry=False,  # what was not sent is sent by the reconciler
        )

    def send(self, job_id: str) -> None:
        """Puts a job on the queue.

        Raises:
            kombu.exceptions.OperationalError: Redis cannot be reached.
        """
        self.app.send_task(self.task, (job_id,), queue=self.kind)

    def waiting(self) -> int:
        """How many messages nobody has taken yet."""
        with self.app.connection_for_read() as connection:
            channel: Any = connection.default_channel
            return channel.client.llen(self.kind)


@worker_shutting_down.connect
def _stop(**_: Any) -> None:
    stopping.set()
