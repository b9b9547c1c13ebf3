"""What the keys of several teachers need of each other and of the rest of the section."""

from megatron_opd.config.schema import Config
from megatron_opd.errors import UserError


def check_several_teachers(config: Config) -> None:
    """One teacher, or several that are either routed or mixed. Raises UserError."""
    teacher = config.teacher
    if not teacher.paths:
        for key in ("route_field", "weights"):
            if getattr(teacher, key):
                raise UserError(
                    f"teacher.{key}: teacher.path is the only teacher: remove it, or give teacher.paths"
                )
        return
    if teacher.path is not None:
        raise UserError(
            "teacher.path: teacher.paths names the teachers: remove one of the two (teacher.path=null)"
        )
    if (teacher.route_field is None) == (not teacher.weights):
        raise UserError(
            "teacher.paths: give either teacher.route_field, for one teacher a prompt, or teacher.weights, to mix them"
        )
    differing = sorted(teacher.paths.keys() ^ teacher.weights.keys()) if teacher.weights else []
    if differing:
        where, other = ("weights", "paths") if differing[0] in teacher.weights else ("paths", "weights")
        raise UserError(
            f"teacher.{where}.{differing[0]}: is not in teacher.{other}: add it there, or remove it"
        )
    if teacher.engine == "sglang":
        raise UserError(
            "teacher.paths: servers serve one teacher: give teacher.path, or set teacher.engine to megatron"
        )
    if teacher.parallel is not None and teacher.parallel.separate:
        raise UserError(
            "teacher.parallel.separate: several teachers are on the student's processes: set it to false"
        )
