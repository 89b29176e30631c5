"""The first steps of a run, where they choose the locations of components instead of training them."""

from __future__ import annotations

from collections.abc import Collection

BY_GRADIENT = "gradient"


def check_location_init(init: str, given: Collection[str]) -> None:
    """
    Args:
        given: the fields that the user has set.

    Raises:
        ValueError: a setting of that choice which nothing would read.
    """
    for flag in ("location_batches", "location_rule"):
        if flag in given and init != BY_GRADIENT:
            raise ValueError(f"--{flag}: say --location_init {BY_GRADIENT} too")


def spent_on_locations(init: str, batches: int, most: int, what: str) -> int:
    """Steps of a run that choose locations: 0, or so many batches.

    Args:
        most: steps that there are, of which some must be left.
        what: has so many, for the sentence.

    Raises:
        ValueError: none would be left.
    """
    if init != BY_GRADIENT:
        return 0
    if batches >= most:
        raise ValueError(f"location_batches={batches}: {what} has {most} steps; choose by fewer batches")
    return batches
