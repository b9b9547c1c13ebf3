"""Reverse KL from hidden states and LM heads, for `tools.bench.objectives`: fused, with whole logits, and the floor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_opd.objectives import linear_divergence, vocab_parallel_divergence
from tools.bench import straightforward


def with_gradient(divergence_N: Tensor, upstream_N: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """(the divergence, gradients of the inputs)."""
    gradients = torch.autograd.grad(divergence_N, inputs, upstream_N)
    return divergence_N.detach(), *gradients


class Head:
    """Hidden states and heads of both models, and the ways to their reverse KL and its gradients."""

    def __init__(
        self, tokens: int, vocab: int, hidden: int, chunk: int, dtype: torch.dtype, device: str
    ) -> None:
        torch.manual_seed(0)
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.hiddens = [torch.randn(tokens, hidden, **options) for _ in range(2)]
        self.weights = [3.0 * hidden**-0.5 * torch.randn(vocab, hidden, **options) for _ in range(2)]
        self.upstream = torch.rand(tokens, device=device)
        self.chunk = min(chunk, tokens)
        self._logits = [torch.zeros(self.chunk, vocab, **options) for _ in range(2)]
        self._gradients = torch.empty(tokens, hidden, **options), torch.zeros(vocab, hidden, **options)

    def floor(self, chunked: bool = True) -> tuple[Tensor, ...]:
        """The six matrix products, outputs allocated before; not chunked: the four of a head that keeps logits."""
        hidden_grad, weight_grad = self._gradients
        count = len(self.upstream)
        for start in range(0, count, self.chunk):
            rows = slice(start, min(start + self.chunk, count))
            student, teacher = (logits[: rows.stop - start] for logits in self._logits)
            for _ in range(2 if chunked else 1):
                torch.mm(self.hiddens[0][rows], self.weights[0].t(), out=student)
                torch.mm(self.hiddens[1][rows], self.weights[1].t(), out=teacher)
            torch.mm(student, self.weights[0], out=hidden_grad[rows])
            torch.addmm(weight_grad, student.t(), self.hiddens[0][rows], beta=0.5, out=weight_grad)
        return self._gradients

    def fused(self, weight_grad: Tensor | None = None) -> tuple[Tensor, ...]:
        """linear_divergence."""
        hidden, weight = self._student()
        stats = linear_divergence(
            hidden, weight, self.hiddens[1], self.weights[1], chunk_size=self.chunk, weight_grad=weight_grad
        )
        return with_gradient(stats.divergence, self.upstream, hidden, weight)

    def kept_logits(self) -> tuple[Tensor, ...]:
        """Whole logits, our divergence, gradient in place."""
        hidden, weight = self._student()
        teacher = self.hiddens[1] @ self.weights[1].t()
        stats = vocab_parallel_divergence(hidden @ weight.t(), teacher, inplace_backward=True)
        return with_gradient(stats.divergence, self.upstream, hidden, weight)

    def autograd(self) -> tuple[Tensor, ...]:
        """Whole logits, the straightforward divergence."""
        hidden, weight = self._student()
        student, teacher = hidden @ weight.t(), self.hiddens[1] @ self.weights[1].t()
        divergence, gradient = straightforward.autograd_reverse_kl(student, teacher, self.upstream)
        return divergence, *torch.autograd.grad(student, (hidden, weight), gradient)

    def _student(self) -> tuple[Tensor, Tensor]:
        return self.hiddens[0].detach().requires_grad_(), self.weights[0].detach().requires_grad_()
