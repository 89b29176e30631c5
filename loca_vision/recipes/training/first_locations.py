"""The first steps of a run, if they choose the locations of components instead of training them."""

from __future__ import annotations

from collections.abc import Collection

BY_GRADIENT = "gradient"


def check_location_init(init: str, given: Collection[str]) -> None:
    """Check that the settings for choosing locations by gradient are given only if they are used.

    Args:
        given: the fields that the user has set.

    Raises:
        ValueError: one of these settings is given but would not be used.
    """
    for flag in ("location_batches", "location_rule"):
        if flag in given and init != BY_GRADIENT:
            raise ValueError(f"--{flag}: say --location_init {BY_GRADIENT} too")


def spent_on_locations(init: str, batches: int, most: int, what: str) -> int:
    """Return the number of steps of a run that choose locations: 0, or one for each of these batches.

    Args:
        most: the total number of steps, of which some must be left.
        what: what has that many steps, for the error message.

    Raises:
        ValueError: no step would be left.
    """
    if init != BY_GRADIENT:
        return 0
    if batches >= most:
        raise ValueError(f"location_batches={batches}: {what} has {most} steps; choose by fewer batches")
    return batches
