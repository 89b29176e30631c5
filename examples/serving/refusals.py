"""Refusals of requests, and the isolation of requests in a batch from each other's errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class Refusal(Exception):
    """The refusal of a request.

    Args:
        status: the HTTP status.
        sentence: what was expected, and what was received.
        again: seconds after which the same request may succeed; None if it will not.
    """

    def __init__(self, status: int, sentence: str, again: int | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.again = status, sentence, again

    def __reduce__(self) -> tuple[type[Refusal], tuple[int, str, int | None]]:
        return Refusal, (self.status, self.sentence, self.again)

    def reply(self) -> Reply:
        """Return the HTTP reply for this refusal."""
        headers = {} if self.again is None else {"Retry-After": str(self.again)}
        return Reply.of_json({"error": self.sentence}, self.status, headers)


@dataclass(frozen=True)
class Reply:
    """An HTTP reply."""

    status: int
    body: bytes
    kind: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of_json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
        return Reply(status, json.dumps(content, allow_nan=False).encode() + b"\n", headers=headers or {})


def each(asked: Sequence[Asked], together: Callable[[Sequence[Asked]], Sequence[Answer]]) -> list[Answer | Exception]:
    """Answer all requests together; if that fails, halve the batch, so that only requests that fail alone get no answer.

    Args:
        together: answers several requests at once, or raises an error.

    Returns:
        For each request, its answer or the error that prevented it.
    """
    if not asked:
        return []
    try:
        answers = together(asked)
        if len(answers) != len(asked):
            raise RuntimeError(f"{len(asked)} requests have {len(answers)} answers")
        return list(answers)
    except Exception as error:  # whatever went wrong, the other requests still get their answers
        if len(asked) == 1:
            return [error]
    half = len(asked) // 2
    return each(asked[:half], together) + each(asked[half:], together)
