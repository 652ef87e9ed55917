"""What tests of methods need, for ramify's own and for a plugin's: a model and a tokenizer made of nothing."""

from ramify.testing.fake_model import FakeCache, FakeModel, FakeOut, FakeView
from ramify.testing.fake_tokenizer import FakeTokenizer

__all__ = ["FakeCache", "FakeModel", "FakeOut", "FakeTokenizer", "FakeView"]
