"""When what a teacher says can be kept, and used again."""

from megatron_opd.config.schema import Config, TeacherConfig
from megatron_opd.errors import UserError


def check_teacher_cache(config: Config) -> None:
    """Conditions between teacher.cache and other keys. Raises UserError."""
    teacher = config.teacher
    if teacher.cache is None:
        if teacher.cache_gb != TeacherConfig.model_fields["cache_gb"].default:
            raise UserError("teacher.cache_gb: read with teacher.cache only: give that, or remove it")
        return
    if teacher.ema is not None:
        raise UserError(
            "teacher.cache: the weights of a teacher that follows the student are others after every update: leave it "
            "null, or teacher.ema"
        )
    if teacher.engine == "sglang" and config.objective.support.startswith("student_topk"):
        raise UserError(
            "teacher.cache: servers are asked about the student's likeliest ids, which are others after every update: "
            "leave it null, or set objective.support to teacher_topk"
        )
