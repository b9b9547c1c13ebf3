"""Lets torchvision be imported beside a torch without CUDA; Python runs this file at every start of the environment.

torchvision's wheel is linked against CUDA's torch, so its compiled part does not load, and the import fails where it
registers a fake kernel for two operators of that part. They are declared just before torchvision is first looked for.
"""

import sys
from importlib.machinery import ModuleSpec

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[object] = []  # the declarations end when their library object does


class _BeforeTorchvision:
    """A finder that finds nothing: it declares the operators when it is asked for torchvision."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "torchvision" and not _declared:
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            _declared.append(library)
            for operator in ("nms", "qnms"):
                library.define(operator + _SIGNATURE)
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
