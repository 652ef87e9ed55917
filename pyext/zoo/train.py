"""Train the zoo: a byte-level BPE of 4,096 tokens, a small Llama target and a smaller Llama drafter, on Python sources.

    python -m ramify.zoo.train --out FOLDER [--only tokenizer|target|drafter] [--tokens N] [--package NAME ...] [--distil]

Written for two CPU cores and a couple of hours: the hidden matrices train with Muon, embeddings and gains with AdamW,
one cosine schedule for both, short sequences first and the full 2,048 positions for the last part. Both learn the
text; with --distil the drafter learns what the target would say of it, since a guess is accepted as often as the two laws
agree. A run that was stopped goes on from its last checkpoint, also to more tokens than were planned. Needs the optional
packages of `pip install 'ramify[zoo]'`.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ramify.zoo import corpus
from ramify.zoo.card import write_card
from ramify.zoo.muon import Muon

VOCABULARY, POSITIONS, END_OF_TEXT = 4096, 2048, "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """One model of the zoo, as it ships: its shape, and how long and how fast it learns."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    peak: float  # learning rate of Muon's matrices at the top of the schedule
    tokens: float  # how many it reads
    teacher: str = ""  # the model whose law it learns; else it learns the text

    def config(self) -> LlamaConfig:
        """Hugging Face's description of this shape: head size 64, tied embeddings, 2,048 positions."""
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=64,
            intermediate_size=self.inner,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
            use_cache=True,
        )


RECIPES = {
    "target": Recipe("target", hidden=256, layers=9, heads=4, kv_heads=2, inner=768, peak=0.02, tokens=1.01e7),
    "drafter": Recipe("drafter", hidden=192, layers=2, heads=3, kv_heads=1, inner=512, peak=0.02, tokens=4.5e6),
}
BATCH_TOKENS = 8192
ADAM_SHARE = 0.15  # AdamW's learning rate as a share of Muon's
STAGES = ((512, 0.85), (POSITIONS, 1.0))  # (sequence length, until this share of the tokens)


def train_tokenizer(texts: Sequence[str], folder: Path) -> Tokenizer:
    """Byte-level BPE over `texts`; writes tokenizer.json and its config into `folder` in Hugging Face's form."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, clean_up_tokenization_spaces=False, **names)
    fast.save_pretrained(folder)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """All texts as one int64 stream, each followed by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream: list[int] = []
    for first in range(0, len(texts), 256):
        for encoding in tokenizer.encode_batch(list(texts[first : first + 256])):
            stream += encoding.ids
            stream.append(end)
    return torch.tensor(stream)


def batches(stream: torch.Tensor, length: int, seed: int):
    """Endless batches int64 [BATCH_TOKENS / length, length + 1]: random windows, each epoch with its own offset and order."""
    rng, rows = torch.Generator().manual_seed(seed), BATCH_TOKENS // length
    while True:
        offset = int(torch.randint(length, (1,), generator=rng))
        starts = torch.arange(offset, len(stream) - length - 1, length)
        starts = starts[torch.randperm(len(starts), generator=rng)]
        for first in range(0, len(starts) - rows + 1, rows):
            yield torch.stack([stream[start : start + length + 1] for start in starts[first : first + rows]])


def faster_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies it faster than float32, else float32: measured, since ISA flags do not tell."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        a @ b
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        seconds[dtype] = time.perf_counter() - start
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else torch.float32


def optimizers(model: LlamaForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and gains."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, lr=peak),
        torch.optim.AdamW(others, lr=ADAM_SHARE * peak, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: a short warm-up, then a cosine down to 2%."""
    warm = max(1, min(60, steps // 20))
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor, teacher: LlamaForCausalLM | None = None) -> torch.Tensor:
    """Mean cross-entropy in nats over a batch of windows: with the next tokens, or with what the teacher expects there."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits.flatten(0, 1).float()
    if teacher is None:
        return F.cross_entropy(logits, batch[:, 1:].flatten())
    with torch.no_grad():
        expected = teacher(input_ids=batch[:, :-1], use_cache=False).logits.flatten(0, 1).float().softmax(-1)
    return F.cross_entropy(logits, expected)


@torch.no_grad()
def agreement(model: LlamaForCausalLM, teacher: LlamaForCausalLM, tokenizer: Tokenizer, length: int = 512) -> float:
    """Share of held-out positions (the first window of each module) where both models think the same token likeliest."""
    same, count = 0, 0
    for text in corpus.held_out_texts().values():
        window = torch.tensor(tokenizer.encode(text).ids[:length])[None]
        ours, theirs = (m(input_ids=window, use_cache=False).logits.argmax(-1) for m in (model, teacher))
        same, count = same + int((ours == theirs).sum()), count + window.shape[1]
    return round(same / count, 4)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: Tokenizer, length: int = 1024) -> dict[str, float]:
    """Loss in nats per token and bits per byte over the held-out modules, in windows of `length` tokens."""
    nats, tokens, size = 0.0, 0, 0
    for text in corpus.held_out_texts().values():
        ids = torch.tensor(tokenizer.encode(text).ids)
        for first in range(0, len(ids) - 1, length):
            window = ids[first : first + length + 1][None]
            nats += float(loss_of(model, window)) * (window.shape[1] - 1)
            tokens += window.shape[1] - 1
        size += len(text.encode())
    return {"nats_per_token": round(nats / tokens, 4), "bits_per_byte": round(nats / math.log(2) / size, 4), "tokens": tokens}


def train_model(recipe: Recipe, tokenizer: Tokenizer, stream: torch.Tensor, tokens: int, out: Path, seed: int) -> dict:
    """Train one model to `tokens` tokens and save it, bf16, in Hugging Face's form. Returns its figures."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else faster_dtype()
    model = LlamaForCausalLM(recipe.config()).to(device)
    teacher = LlamaForCausalLM.from_pretrained(out / recipe.teacher, dtype=torch.float32).to(device) if recipe.teacher else None
    steps, state_file, figures = tokens // BATCH_TOKENS, out / f".{recipe.name}.train.pt", []
    optims, first, spent = optimizers(model, recipe.peak), 0, 0.0
    planned = [steps * BATCH_TOKENS]
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optim, saved in zip(optims, state["optimizers"], strict=True):
            optim.load_state_dict(saved)
        first, spent, figures = state["step"], state["seconds"], state["figures"]
        planned = [*(n for n in state.get("planned", []) if n < planned[0]), *planned]
    compiled, expecting = torch.compile(model, dynamic=False), teacher and torch.compile(teacher, dynamic=False)
    peaks = (recipe.peak, ADAM_SHARE * recipe.peak)
    sources = {length: batches(stream, length, seed + length + first) for length, _ in STAGES}
    start, bar = time.perf_counter(), tqdm(range(first, steps), initial=first, total=steps, desc=recipe.name, unit="step", mininterval=10)
    for step in bar:
        length = next(length for length, until in STAGES if step < until * steps or until == 1.0)
        for optim, top in zip(optims, peaks, strict=True):
            optim.param_groups[0]["lr"] = top * schedule(step, steps)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = loss_of(compiled, next(sources[length]).to(device), expecting)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        if step % 10 == 0:
            figures.append((step, round(float(loss), 4)))
            bar.set_postfix(loss=f"{float(loss):.3f}")
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = spent + time.perf_counter() - start
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optims]}
            state |= {"step": step + 1, "seconds": seconds, "figures": figures, "planned": planned}
            torch.save(state, f"{state_file}.part")
            os.replace(f"{state_file}.part", state_file)
    model = model.to("cpu", torch.bfloat16).float()  # judge what ships: the rounded weights
    held_out = held_out_loss(model.eval(), tokenizer)
    folder = out / recipe.name
    model.to(torch.bfloat16).save_pretrained(folder)
    parameters = sum(p.numel() for p in model.parameters())
    seconds = spent + time.perf_counter() - start
    summary = {
        "name": recipe.name,
        "parameters": parameters,
        "tokens": steps * BATCH_TOKENS,
        "planned": planned,
        "unique_tokens": len(stream),
        "seconds": round(seconds),
        "autocast": str(dtype).removeprefix("torch."),
        "held_out": held_out,
        "losses": figures,
    }
    if teacher:
        summary |= {"teacher": recipe.teacher, "agreement": agreement(model, teacher.to("cpu"), tokenizer)}
    (folder / "training.json").write_text(json.dumps(summary) + "\n")
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m ramify.zoo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("zoo"), help="folder for the tokenizer and both models (default: zoo)")
    parser.add_argument("--tokens", type=float, help="training tokens of each model (default: what the shipped ones read)")
    parser.add_argument("--package", action="append", default=[], help="also train on this installed, permissively licensed package")
    parser.add_argument("--only", choices=["tokenizer", *RECIPES], help="one part; the default makes all three")
    parser.add_argument(
        "--distil", action="store_true", help="the drafter learns the law of the target, which --out must hold, not the text"
    )
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    texts = corpus.training_texts(options.package, options.seed)
    wanted = [options.only] if options.only in RECIPES else [] if options.only else list(RECIPES)
    tokenizer_file = options.out / "target" / "tokenizer.json"
    if options.only == "tokenizer" or not tokenizer_file.exists():
        for name in RECIPES:
            train_tokenizer(texts, options.out / name)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    stream = encode(tokenizer, texts)
    print(f"{len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} M characters, {len(stream) / 1e6:.2f} M tokens")
    for name in wanted:
        recipe = RECIPES[name]
        if options.distil and name != "target":
            recipe = replace(recipe, teacher="target")
        summary = train_model(recipe, tokenizer, stream, int(options.tokens or recipe.tokens), options.out, options.seed)
        write_card(options.out / name, summary, options.package)
        print(json.dumps({key: value for key, value in summary.items() if key != "losses"}))


if __name__ == "__main__":
    main()
