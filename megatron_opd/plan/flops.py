"""Floating-point operations of a rank in a step, by phase; a multiply and an add are two.

A token costs 2 per weight of every matrix that it passes through (K of the experts), spread evenly over the ranks that
share them, and in attention 4 D per key that it sees and query head: half of its segment's, causally. Backward is
twice the products of forward, and 2.5 times its attention, whose weights are computed again. Norms, activation
functions and softmaxes are left out: they are bound by memory, and `achieved` of the hardware covers them. Servers
compute elsewhere.
"""

from megatron_opd.models.architecture import Architecture
from megatron_opd.plan.parameters import stage_layers
from megatron_opd.plan.setting import Pack, Setting

_BACKWARD_PRODUCTS = 2.0
_BACKWARD_ATTENTION = 2.5


def matrix_weights(arch: Architecture) -> int:
    """Weights of the matrices of a layer that one token passes through, over all ranks."""
    width = arch.head_dim * (2 * arch.num_heads + 2 * arch.num_kv_groups)
    attention = arch.hidden_size * width
    if arch.moe is None:
        return attention + 3 * arch.hidden_size * arch.ffn_size
    experts = arch.moe.experts_per_token * 3 * arch.hidden_size * arch.moe.expert_ffn_size
    return attention + arch.hidden_size * arch.num_experts + experts


def layer_products(setting: Setting, arch: Architecture, tokens: float) -> float:
    """Matrix products of a layer's forward pass over `tokens` of a replica, the share of a rank."""
    return 2 * tokens * matrix_weights(arch) / (setting.layout.tensor * setting.layout.context)


def layer_attention(setting: Setting, arch: Architecture, pack: Pack) -> float:
    """Attention of a layer's forward pass over a microbatch, the share of a rank."""
    width = arch.num_heads * arch.head_dim
    ranks = setting.layout.tensor * setting.layout.context
    return 4 * pack.padded * pack.longest / 2 * width / ranks


def layer_forward(setting: Setting, arch: Architecture, pack: Pack) -> float:
    """A layer's forward pass over a microbatch, the share of a rank."""
    return layer_products(setting, arch, pack.tokens) + layer_attention(setting, arch, pack)


def layer_backward(setting: Setting, arch: Architecture, pack: Pack) -> float:
    """A layer's backward pass, without what is computed again."""
    products, attention = layer_products(setting, arch, pack.tokens), layer_attention(setting, arch, pack)
    return _BACKWARD_PRODUCTS * products + _BACKWARD_ATTENTION * attention


def layer_again(setting: Setting, arch: Architecture, pack: Pack) -> float:
    """What the recompute policy computes a second time: nothing, attention, or the whole forward pass."""
    recompute = setting.config.training.recompute
    if recompute == "full":
        return layer_forward(setting, arch, pack)
    return layer_attention(setting, arch, pack) if recompute == "selective" else 0.0


def head_product(setting: Setting, hidden: int, tokens: float) -> float:
    """Logits of `tokens` of a replica from hidden states of this size: the share of a rank of the last stage."""
    return 2 * tokens * hidden * setting.vocab_shard / setting.layout.context


def objective_flops(setting: Setting, pack: Pack) -> float:
    """Head of a microbatch: logits of the models here, twice with `head_chunk`, but of a teacher that made them when it
    scored; both gradients of the student's."""
    student = head_product(setting, setting.student.hidden_size, pack.loss_tokens)
    teacher = 0.0
    if setting.teacher is not None and not setting.teacher_projects:
        teacher = head_product(setting, setting.teacher.hidden_size, pack.loss_tokens)
    times = 1 if setting.config.objective.head_chunk is None else 2
    return times * (student + teacher) + 2 * student


def decode_layer(setting: Setting, arch: Architecture, slots: float) -> float:
    """One token of every sequence decoded together through a layer, with `slots` keys each; rollouts have no CP."""
    rows = setting.workload.decoded_together
    attention = 4 * rows * slots * arch.num_heads * arch.head_dim
    return (2 * rows * matrix_weights(arch) + attention) / setting.layout.tensor


def stage_flops(setting: Setting, stage: int) -> dict[str, float]:
    """Of a rank of a stage in one step, by what they are for."""
    work, student = setting.workload, setting.student
    last = stage == setting.layout.pipeline - 1
    passes = work.updates * work.microbatches
    own = stage_layers(student, setting.layout)
    prompts = work.prompts * work.prompt
    prefill = 2 * prompts * matrix_weights(student) / setting.layout.tensor
    prefill += 2 * prompts * work.prompt * student.num_heads * student.head_dim / setting.layout.tensor
    mean_slots = work.prompt + work.response / 2
    batches = work.generated / work.decoded_together
    decode = own * decode_layer(setting, student, mean_slots) * work.response * batches
    if last:
        head = 2 * student.hidden_size * setting.vocab_shard
        decode += head * work.response * work.generated
    found = {
        "rollout: prompts": setting.own_rollouts * own * prefill,
        "rollout: tokens": setting.own_rollouts * decode,
        **(teacher_flops(setting, stage) if setting.teacher_here else {}),
        "other scoring": passes * _other_scoring(setting, stage),
        "student forward": passes * own * layer_forward(setting, student, work.pack),
        "recomputation": passes * own * layer_again(setting, student, work.pack),
        "student backward": passes * own * layer_backward(setting, student, work.pack),
        "heads and objective": passes * objective_flops(setting, work.pack) if last else 0.0,
    }
    return {name: flops for name, flops in found.items() if flops}


def teacher_flops(setting: Setting, stage: int) -> dict[str, float]:
    """The teacher's passes of a step, on a rank of this stage of its layout, which is that of `setting`."""
    work, arch = setting.workload, setting.teacher
    assert arch is not None
    teacher = stage_layers(arch, setting.layout) * layer_forward(setting, arch, work.teacher_pack)
    if stage == setting.last_stage and setting.teacher_projects:
        teacher += head_product(setting, arch.hidden_size, work.pack.loss_tokens)
    return {"teacher forward": work.updates * work.microbatches * teacher}


def _other_scoring(setting: Setting, stage: int) -> float:
    """Log-probs of a reference (every update) and of the student as it was (all but the first), and the student's
    likeliest ids for a teacher behind servers (every update), a microbatch."""
    total = 0.0
    for arch, share in scoring_passes(setting):
        layers = stage_layers(arch, setting.layout)
        total += share * layers * layer_forward(setting, arch, setting.workload.pack)
        if stage == setting.layout.pipeline - 1:
            total += share * head_product(setting, arch.hidden_size, setting.workload.pack.loss_tokens)
    return total


def scoring_passes(setting: Setting) -> list[tuple[Architecture, float]]:
    """Models that score besides the teacher, and in which share of the updates."""
    passes = [] if setting.reference is None else [(setting.reference, 1.0)]
    updates = setting.workload.updates
    if updates > 1 and setting.objective.reads_old_logprobs:
        passes.append((setting.student, (updates - 1) / updates))
    if setting.names_ids:
        passes.append((setting.student, 1.0))
    return passes
