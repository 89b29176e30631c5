"""Why a request is not answered, and how the requests of one batch are kept apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class Refusal(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        sentence: what was expected, and what came.
        again: seconds after which the same request may be answered; None where it will not be.
    """

    def __init__(self, status: int, sentence: str, again: int | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.again = status, sentence, again

    def __reduce__(self) -> tuple[type[Refusal], tuple[int, str, int | None]]:
        return Refusal, (self.status, self.sentence, self.again)

    def reply(self) -> Reply:
        """As HTTP has it."""
        headers = {} if self.again is None else {"Retry-After": str(self.again)}
        return Reply.of_json({"error": self.sentence}, self.status, headers)


@dataclass(frozen=True)
class Reply:
    """What goes back over HTTP."""

    status: int
    body: bytes
    kind: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of_json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
        return Reply(status, json.dumps(content, allow_nan=False).encode() + b"\n", headers=headers or {})


def each(asked: Sequence[Asked], together: Callable[[Sequence[Asked]], Sequence[Answer]]) -> list[Answer | Exception]:
    """The answer of each, computed together; where that fails, in halves, so that only what fails by itself has no answer.

    Args:
        together: answers some of them at once, or raises.

    Returns:
        In the place of each its answer, or why it has none.
    """
    if not asked:
        return []
    try:
        answers = together(asked)
        if len(answers) != len(asked):
            raise RuntimeError(f"{len(asked)} requests have {len(answers)} answers")
        return list(answers)
    except Exception as error:  # whatever it is, the neighbours of the one that it is about get their answers
        if len(asked) == 1:
            return [error]
    half = len(asked) // 2
    return each(asked[:half], together) + each(asked[half:], together)
