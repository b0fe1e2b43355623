"""OpenAI's lists, a page at a time."""

from typing import Any


def page(items: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A page of OpenAI's lists, of up to `limit` + 1 items that were found."""
    shown = items[:limit]
    return {
        "object": "list",
        "data": shown,
        "has_more": len(items) > limit,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
    }
