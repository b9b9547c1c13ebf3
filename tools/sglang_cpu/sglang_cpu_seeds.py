"""Plugin of SGLang, run in each of its processes: seeds of requests are honoured on a CPU too.

SGLang reads `sampling_seed` only under --enable-deterministic-inference, and allows that only with GPU attention.
Here it goes with `torch_native`, without the batch-invariant kernels, which are CUDA's: a seed fixes the noise of a
response, while its logits may still differ in the last bits with what shares the batch.
"""


def activate() -> None:
    """Called by SGLang, before it reads its arguments. Does nothing on a machine that SGLang does not call a CPU."""
    from sglang.srt.utils import is_cpu

    if not is_cpu():
        return
    import sglang.srt.batch_invariant_ops as batch_invariant
    from sglang.srt.arg_groups import choices

    backend = "torch_native"
    if backend not in choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES:
        choices.add_deterministic_attention_backend_choices([backend])
        choices.add_radix_supported_deterministic_attention_backend_choices([backend])
    batch_invariant.enable_batch_invariant_mode = lambda *args, **kwargs: None
