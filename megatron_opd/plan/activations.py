"""What the forward pass of a model chunk keeps for its backward pass, in bytes, from the operations it is made of.

Symbols of the docstrings: t positions of a rank (tokens / CP), s those of the residual stream (t / TP with sequence
parallelism), H hidden size, Q and G widths of a rank's queries and of its keys (heads * head size / TP), A its query
heads, D head size, F its feed-forward width, c bytes of a value of the weights' dtype. Norms and the residual stream
are float32, whatever c is.

Kernels: a GPU's fused norm keeps its input and a number a row; on a CPU torch computes it in steps and keeps a
float32 copy of a bf16 input and the normalised values besides. torch's attention keeps its inputs, output and a
number a head and position, padded to the longest segment, on a CPU in float32; transformer-engine's needs no padding.
"""

from dataclasses import dataclass

from megatron_opd.models.architecture import Architecture
from megatron_opd.plan.parameters import Chunk
from megatron_opd.plan.setting import Pack, Setting

_FP32 = 4
_INDEX = 8  # int64


@dataclass(frozen=True)
class Widths:
    """The symbols above, for one model, layout and microbatch."""

    t: int
    s: int
    H: int
    Q: int
    G: int
    A: int
    D: int
    F: int
    c: int
    padded: int  # query positions of attention on this rank
    keys: int  # key positions
    longest: int
    context: int
    cpu: bool
    engine: bool

    @classmethod
    def of(cls, setting: Setting, arch: Architecture, pack: Pack) -> "Widths":
        """Of a microbatch in this setting."""
        layout = setting.layout
        t = pack.tokens // layout.context
        return cls(
            t=t,
            s=t // layout.tensor if layout.sequence_parallel else t,
            H=arch.hidden_size,
            Q=arch.num_heads * arch.head_dim // layout.tensor,
            G=arch.num_kv_groups * arch.head_dim // layout.tensor,
            A=arch.num_heads // layout.tensor,
            D=arch.head_dim,
            F=arch.ffn_size // layout.tensor,
            c=setting.bytes_per_value,
            padded=pack.padded // layout.context,
            keys=pack.padded,
            longest=pack.longest,
            context=layout.context,
            cpu=setting.kernels == "cpu",
            engine=setting.kernels == "transformer-engine" and setting.config.precision == "bf16",
        )


def kept_by_chunk(setting: Setting, arch: Architecture, pack: Pack, chunk: Chunk) -> int:
    """Bytes that one microbatch keeps in a model chunk, from its forward to its backward pass.

    The layers, by recompute policy: `none` everything, `selective` all but attention's part, `full` the input of every
    layer. First chunk: the token ids. Last chunk: the final norm and its output. Other chunks: the residual stream
    that was sent on, which the schedule holds until its gradient has come.
    """
    w = Widths.of(setting, arch, pack)
    recompute = setting.config.training.recompute
    kept = chunk.layers * kept_by_layer(setting, arch, pack, recompute)
    if recompute == "full":
        kept += _FP32 * w.longest * w.D  # the angles of the rotary embedding, one tensor for all layers
    if chunk.first:
        kept += _INDEX * w.t
    return kept + (_norm(w, w.s) + w.c * w.s * w.H if chunk.last else _FP32 * w.s * w.H)


def kept_by_layer(setting: Setting, arch: Architecture, pack: Pack, recompute: str = "none") -> int:
    """Bytes that one layer keeps. With `full`: its input, 4 s H."""
    w = Widths.of(setting, arch, pack)
    if recompute == "full":
        return _FP32 * w.s * w.H
    attention = _attention_inputs(w) if recompute == "selective" else _attention(w)
    if recompute == "selective" and not _keeps_projection(w, arch):
        attention += w.c * w.t * (w.Q + 2 * w.G)  # through the value, which is a view of it
    # The norms' outputs are the inputs of the projections; a router keeps a float32 copy of its own instead.
    outputs = 1 if arch.moe and w.c < _FP32 else 2
    norms = 2 * _norm(w, w.s) + outputs * w.c * w.s * w.H
    ends = w.c * w.t * w.Q  # input of the output projection
    return norms + _queries_and_keys(w, arch) + attention + ends + _feed_forward(setting, w, arch)


def recomputed_attention(setting: Setting, arch: Architecture, pack: Pack) -> int:
    """Bytes that exist again while the backward pass is at a layer with `selective`: attention's part."""
    return _attention(Widths.of(setting, arch, pack))


def _norm(w: Widths, positions: int) -> int:
    """Of the residual stream: its input 4 s H and a number a position; on a CPU the normalised values too."""
    return _FP32 * positions * (w.H * (2 if w.cpu else 1) + 1)


def _keeps_projection(w: Widths, arch: Architecture) -> bool:
    """Whether the norm of the keys holds the whole output of the QKV projection, of which they are a view."""
    return arch.qk_norm and not (w.cpu and w.c < _FP32)  # a float32 copy replaces it


def _queries_and_keys(w: Widths, arch: Architecture) -> int:
    """Norms of queries and keys (where the family has them), sines and cosines of both: 4 c t D."""
    rotary = 4 * w.c * w.t * w.D
    if not arch.qk_norm:
        return rotary
    rows = _FP32 * w.t * (w.Q + w.G) // w.D
    copied = _FP32 * w.t * (w.Q + w.G)
    # Otherwise queries are a copy, and keys a view of the projection's output.
    inputs = w.c * w.t * (w.Q + w.Q + 2 * w.G) if _keeps_projection(w, arch) else copied
    return rotary + inputs + (copied if w.cpu else 0) + rows


def _attention(w: Widths) -> int:
    """Queries, keys, values, output and A normalisers a position; float32 on a CPU, padded without
    transformer-engine.

    Padded positions also have an index (int64) and a mark of what is no padding. Under context parallelism without
    transformer-engine every rank holds all keys and values and, for each of its two chunks of a segment, a mask of the
    keys that it sees (two bytes or four a key and query).
    """
    value = _FP32 if w.cpu else w.c
    if w.engine:
        return w.c * w.t * (2 * w.Q + 2 * w.G) + _FP32 * w.t * w.A
    kept = value * (w.padded * 2 * w.Q + w.keys * 2 * w.G) + _FP32 * w.padded * w.A
    kept += (_INDEX + 1) * w.padded
    if w.context > 1:
        # Chunks r and 2 CP - 1 - r together see (2 CP + 1) / (2 CP) of a segment's keys, each with L / (2 CP) queries.
        kept += value * (w.padded // 2) * (w.longest * (2 * w.context + 1) // (2 * w.context))
        kept += _INDEX * w.keys
    return kept


def _attention_inputs(w: Widths) -> int:
    """What `selective` keeps instead: rotated queries and keys; the values are a view of the projection's output."""
    return w.c * w.t * (w.Q + w.G)


def _feed_forward(setting: Setting, w: Widths, arch: Architecture) -> int:
    """Dense: gate and up 2 F, silu(gate) F, up once more F (megatron-core adds an offset of 0), their product F.

    Experts: K of them a token, all as wide as they are, spread evenly over the expert-parallel ranks: the tokens in
    the experts' order K H, and 6 F each (the product once more, scaled by the router). The router keeps its input in
    float32, its weight, probabilities and the order of the tokens.
    """
    if arch.moe is None:
        return 5 * w.c * w.t * w.F
    k, experts, width = arch.moe.experts_per_token, arch.num_experts, arch.moe.expert_ffn_size
    router = 0 if w.c == _FP32 else _FP32 * (w.s * w.H + w.H * experts)
    router += w.s * k * (_INDEX + _FP32) + w.s * experts * (_FP32 + 1)
    order = (_INDEX + _FP32) * w.s * k
    if setting.layout.expert > 1:
        order += (_INDEX + _FP32) * w.s * k  # once for sending, once by expert
    return router + order + w.c * w.s * k * (w.H + 6 * width)
