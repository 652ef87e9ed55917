"""GPTQ files of AutoGPTQ and GPTQModel (arXiv 2210.17323), 4 bits, and 8 bits where one scale serves a row.

qweight int32 [K / 8, N] packs eight inputs a word, lowest nibble first; qzeros int32 [groups, N / 8] packs eight outputs a word;
scales [groups, N]; g_idx int32 [K] names the group of each input, and is not k // group under act-order (desc_act). The config
must name bits and group_size: those who read these files do not agree on what stands for them.
"""

import torch

from ramify.fields import Fields
from ramify.quant.sources.base import Parts, Source, choice, count_groups, group_order, group_size, int4, int8, nibbles, refuse
from ramify.quant.weight import QuantizedWeight, pack_nibbles

INT = (torch.int32,)
V1_OFFSET = {4: 0x11111111, 8: 0x01010101}
"""Version 1 files store zero - 1 in every field. GPTQModel, whose convention this is, subtracts this from whole words, so that a zero
of 0 borrows from the field above it; adding it to whole words undoes the borrows as well. Fields that were written one by one, modulo
2^bits, read the same but beside a zero of 0, where the carry makes the next zero one too large."""


class Gptq(Source):
    """quant_method "gptq"."""

    needed = ("qweight", "qzeros", "scales")
    optional = ("g_idx",)

    def __init__(self, config: Fields) -> None:
        super().__init__(config)
        self.bits, self.group = choice(config, "bits", tuple(V1_OFFSET)), group_size(config)
        layout = choice(config, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
        self.offset = V1_OFFSET[self.bits] if layout == "gptq" else 0
        self.act_order, self.head = config.flag("desc_act"), config.flag("lm_head")
        rules = config.object("dynamic")
        for rule in rules.values:
            if not rule.startswith("-:"):
                raise refuse(rules, rule, 'rules that begin with "-:"')

    def covers(self, module: str) -> bool:
        """Every linear layer; the head only where the config says so."""
        return super().covers(module) and (module != "lm_head" or self.head)

    def _read(self, parts: Parts) -> QuantizedWeight:
        per_word = 32 // self.bits
        qweight = parts.take("qweight", INT, None, None)
        N, K = parts.sized(qweight.shape[1], per_word * qweight.shape[0])
        groups = count_groups(parts, K, self.group)
        scale = parts.scale("scales", groups, N).T
        words = parts.take("qzeros", INT, groups, -(-N // per_word)) + self.offset
        zeros = (nibbles(words) if self.bits == 4 else words.view(torch.uint8))[:, :N].T
        g_idx = parts.look("g_idx", INT, K)
        if g_idx is None and self.act_order and groups > 1:
            raise parts.wrong("g_idx", "is missing; desc_act is true, so it says which group each input has")
        perm = None if g_idx is None else group_order(parts, "g_idx", g_idx, groups)
        packed = qweight.T.contiguous().view(torch.uint8)  # already the canonical order along K
        if self.bits == 8:
            return int8(parts, (packed ^ 128).view(torch.int8), scale, zeros ^ 128)
        if perm is not None:
            packed = pack_nibbles(nibbles(packed)[:, perm.long()])
        return int4(parts, packed, scale, zeros, perm)
