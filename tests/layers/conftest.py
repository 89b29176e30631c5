"""Fixtures of the tests of adapted layers."""

import pytest

from loca_vision.layers.effective_weight import EffectiveWeight


@pytest.fixture
def builds(monkeypatch):
    """Counts how often a weight is built."""
    count = []
    build = EffectiveWeight._built
    monkeypatch.setattr(EffectiveWeight, "_built", lambda *given, **more: count.append(1) or build(*given, **more))
    return count
