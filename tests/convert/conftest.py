"""What a conversion measures where nobody names a text: two short ones here, so that a test takes no longer than its own work."""

import pytest

from ramify.zoo import corpus


@pytest.fixture(autouse=True)
def little_held_out_text(monkeypatch):
    monkeypatch.setattr(corpus, "held_out_texts", lambda: {"a": "def add(a, b):\n    return a + b\n", "b": "import os\n"})
