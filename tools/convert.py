"""Checkpoint conversion as a script: `python -m tools.convert COMMAND ...` is `megatron-opd convert COMMAND ...`.

COMMAND is hf-to-megatron, megatron-to-hf, gguf-to-hf, verify or inspect; --help tells the rest.
"""

import sys

from megatron_opd.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
