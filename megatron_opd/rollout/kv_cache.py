"""Keys and values of the sequences that are being generated.

Prompts are aligned on the right: every prompt ends at slot P, so that the next token of all sequences goes to the same
slot and is written without indexing. The unused slots on the left hold zeros and are masked out.

Shapes: B sequences, P longest prompt, L slots (P + new tokens), G key/value groups and R query heads a group on this
rank, D head size, T prompt tokens (packed), E prompts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class KVCache:
    """Keys and values [B, G, L, D] of every layer of this stage, in the compute dtype; allocated once."""

    def __init__(
        self,
        prompt_lengths: list[int],
        new_tokens: int,
        *,
        layers: int,
        groups: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.filled = max(prompt_lengths)  # slots in use
        self._padding = [self.filled - length for length in prompt_lengths]
        shape = (len(prompt_lengths), groups, self.filled + new_tokens, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self._mask = self._build_mask(shape[2], dtype, device)

    def _build_mask(self, slots: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Additive attention mask [B, 1, 1, L], or None when all prompts are equally long."""
        if not any(self._padding):
            return None
        padding_B = torch.tensor(self._padding, device=device)
        unused_BL = torch.arange(slots, device=device) < padding_B[:, None]
        mask_BL = torch.zeros(unused_BL.shape, dtype=dtype, device=device).masked_fill_(unused_BL, -torch.inf)
        return mask_BL[:, None, None]

    def slots(self, row: int) -> range:
        """The slots that the prompt of sequence `row` takes."""
        return range(self._padding[row], self.filled)

    def write_prompts(
        self, layer: int, rows_N: Tensor, slots_N: Tensor, key_NGD: Tensor, value_NGD: Tensor
    ) -> None:
        """Write prompt tokens: token n goes to sequence rows_N[n], slot slots_N[n]."""
        self.keys[layer][rows_N, :, slots_N] = key_NGD
        self.values[layer][rows_N, :, slots_N] = value_NGD

    def attend(
        self, layer: int, query_BGRD: Tensor, key_BGD: Tensor, value_BGD: Tensor, scale: float
    ) -> Tensor:
        """Write one token a sequence into the slot after the filled ones and attend to all: [B, G, R, D].

        `scale` multiplies the products of queries and keys. The query heads of a group stand where the query
        positions usually do: they share keys and values.
        """
        slot = self.filled
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, slot] = key_BGD
        values[:, :, slot] = value_BGD
        mask = None if self._mask is None else self._mask[..., : slot + 1]
        return F.scaled_dot_product_attention(
            query_BGRD, keys[:, :, : slot + 1], values[:, :, : slot + 1], attn_mask=mask, scale=scale
        )

    def advance(self) -> None:
        """Count the slot that the layers have just written."""
        self.filled += 1

    def keep(self, rows: list[int]) -> None:
        """Drop all sequences but these; the kept ones are renumbered in the order given."""
        index = torch.tensor(rows, device=self.keys[0].device)
        for cached in (self.keys, self.values):
            for layer, tensor in enumerate(cached):
                cached[layer] = tensor[index]
        if self._mask is not None:
            self._mask = self._mask[index]
