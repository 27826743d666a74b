"""Repetition, presence and frequency penalties over token counts that live on the device.

Counts are dense rows of the vocabulary, made only for sequences that ask for a penalty: a step is then a few
elementwise operations whatever the sequence's length, and a sequence without penalties costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class PenaltyTable:
    """Token counts of sequences with penalties, a slot each. Slots are reused; the table grows by doubling."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.in_prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)  # [slots, V]
        self.output_counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)  # [slots, V]
        self._free: list[int] = []

    def acquire(self, prompt: Sequence[int], output: Sequence[int]) -> int:
        """A slot that has seen `prompt` and `output`."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self.in_prompt[slot].zero_()
        self.output_counts[slot].zero_()
        self.in_prompt[slot, self._ids(prompt)] = True
        self.append(slot, output)
        return slot

    def append(self, slot: int, output: Sequence[int]) -> None:
        if output:
            ids = self._ids(output)
            self.output_counts[slot].index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def apply(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        repetition: torch.Tensor,
        presence: torch.Tensor,
        frequency: torch.Tensor,
        *,
        ahead: Sequence[Sequence[int]] = (),
    ) -> torch.Tensor:
        """Penalised logits [P, V]; slots and penalties: [P]. ahead: per row, drafts that count as output too.

        Repetition (CTRL, 1909.05858, section 4.1) counts prompt and output, the others the output, as in vLLM.
        """
        counts = self.output_counts[slots]  # [P, V]
        for row, tokens in enumerate(ahead):
            if tokens:
                ids = self._ids(tokens)
                counts[row].index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        in_output = counts > 0
        factor = torch.where(self.in_prompt[slots] | in_output, repetition[:, None], 1.0)
        logits = torch.where(logits > 0, logits / factor, logits * factor)
        return logits - frequency[:, None] * counts - presence[:, None] * in_output

    def _ids(self, tokens: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor(tokens, dtype=torch.int64, device=self.device)
        return ids[ids < self.vocab_size]  # a tokenizer may know more tokens than the model has logits

    def _grow(self) -> None:
        old = len(self.in_prompt)
        new = max(4, old)
        shape = (new, self.vocab_size)
        self.in_prompt = torch.cat([self.in_prompt, self.in_prompt.new_zeros(shape)])
        self.output_counts = torch.cat([self.output_counts, self.output_counts.new_zeros(shape)])
        self._free.extend(range(old + new - 1, old - 1, -1))
