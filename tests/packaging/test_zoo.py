"""The zoo as it ships: its cards are those that the recipe writes, and the command on each names what was trained."""

import json
import platform
import re
from pathlib import Path

import pytest

from ramify.zoo import card

WEIGHTS = Path(__file__).parents[2] / "pyext/zoo/weights"


@pytest.mark.parametrize("name", ["target", "drafter"])
def test_cards(name, tmp_path, monkeypatch):
    shipped, summary = (WEIGHTS / name / "README.md").read_text(), json.loads((WEIGHTS / name / "training.json").read_text())
    monkeypatch.setattr(platform, "python_version", lambda: "3.11.7")  # whose sources it read
    card.write_card(tmp_path, summary)
    assert (tmp_path / "README.md").read_text() == shipped
    card.write_card(tmp_path, {**summary, "teacher": "target", "agreement": 0.5}, ["numpy"])
    assert " --distil --package numpy`" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", ["target", "drafter"])
def test_the_cards_command_trains_what_ships(name, tmp_path, monkeypatch):
    """Shape, tokens and aim; with --distil the drafter alone has a teacher."""
    pytest.importorskip("transformers")
    from ramify.zoo import train

    asked = []

    def trained(recipe, tokenizer, stream, tokens, out, seed):
        asked.append((recipe, tokens // train.BATCH_TOKENS * train.BATCH_TOKENS))
        return {"losses": []}

    monkeypatch.setattr(train, "train_model", trained)
    monkeypatch.setattr(train, "write_card", lambda *args: None)
    monkeypatch.setattr(train.corpus, "training_texts", lambda packages, seed: ["def f(x):\n    return x\n"] * 9)
    summary = json.loads((WEIGHTS / name / "training.json").read_text())
    [command] = re.findall(r"`python -m ramify\.zoo\.train (.*?)`\.\n", (WEIGHTS / name / "README.md").read_text())
    argv = command.replace("--out zoo", f"--out {tmp_path}").split()
    train.main(argv)
    train.main(["--out", str(tmp_path), "--only", name])
    train.main(["--out", str(tmp_path), "--distil"])
    (recipe, tokens), by_default, *distilled = asked
    config = json.loads((WEIGHTS / name / "config.json").read_text())
    assert (recipe, tokens) == by_default and (recipe.name, tokens) == (name, summary["tokens"])
    assert recipe.teacher == summary.get("teacher", "")
    assert (recipe.hidden, recipe.layers, recipe.inner) == tuple(
        config[k] for k in ("hidden_size", "num_hidden_layers", "intermediate_size")
    )
    assert [each.teacher for each, _ in distilled] == ["", "target"]
