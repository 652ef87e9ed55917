"""Calibration text: how much of it is read, and that a zoo model's own is none that it is judged on."""

import pytest

from ramify.convert import calibrate, convert
from ramify.model.load import folder_of

TEXT = "def add(a, b):\n    return a + b\n\n\nfor name in sorted(os.listdir(path)):\n    print(name)\n" * 12


def test_calibration_text(monkeypatch, tmp_path):
    tokenizer = calibrate.Tokenizer.from_folder(folder_of("zoo"))
    ids = tokenizer.encode(TEXT)
    for limit in (130, 256, 300, 10**6):
        found = calibrate.windows(tokenizer, TEXT, False, limit)
        assert [token for part in found for token in part] == ids[:limit] and max(map(len, found)) <= 512
    file = tmp_path / "text"
    file.write_text(TEXT)
    assert calibrate.windows(tokenizer, file, False, 600) == calibrate.windows(tokenizer, TEXT, False, 600)
    asked = []
    monkeypatch.setattr(calibrate.corpus, "training_texts", lambda *args: asked.append(args) or [TEXT, TEXT * 9, TEXT * 30])
    found = calibrate.windows(tokenizer, None, True, 1200)
    assert asked and list(map(len, found)) == [len(found[0]), 512, 1200 - 512 - len(found[0])]
    for text in ("", TEXT[:300]):
        with pytest.raises(ValueError, match=rf"has {len(tokenizer.encode(text))} tokens; takes 128 or more.*Give a longer text"):
            calibrate.windows(tokenizer, text, False, 1000)


def test_the_zoo_is_calibrated_on_nothing_held_out():
    """Whatever the library's training text is, it holds no held-out module."""
    held_out = calibrate.corpus.held_out_texts().values()
    assert held_out and not set(held_out) & set(calibrate.corpus.training_texts())


def test_the_zoo(tmp_path):
    made = convert("zoo-drafter", tmp_path / "out", calibration_tokens=1024, evaluate=TEXT)
    assert (made.method, made.calibration_tokens) == ("gptq", 1024)
    assert abs(made.after.nats_per_token - made.before.nats_per_token) < 0.1
