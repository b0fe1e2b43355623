"""An LRU bounded by bytes."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteLRU(Generic[K, V]):
    """The most recently used values, together at most `capacity` bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0  # bytes
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: K, value: V, size: int) -> None:
        """Keeps `value` of `size` bytes. A value larger than the whole cache is not kept."""
        if size > self.capacity:
            return
        if key in self._entries:
            self.used -= self._entries.pop(key)[1]
        self._entries[key] = (value, size)
        self.used += size
        while self.used > self.capacity:
            _, (_, freed) = self._entries.popitem(last=False)
            self.used -= freed
