# SPDX-License-Identifier: Apache-2.0
"""Lets SGLang's wheel run on a CPU: put this folder first on PYTHONPATH. For tests only.

(a) SGLang imports torchvision, whose compiled operators are missing beside a CPU torch; its import
fails when it registers fake kernels for them, unless they are declared. (b) SGLang's rotary layer
imports a kernel of vLLM's on platforms that it does not know; the native forward never calls it.
"""

import importlib.abc
import importlib.machinery
import sys
import types

_kept: list[object] = []


def _declare_torchvision_operators() -> None:
    import torch

    if _kept:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)  # its operators live as long as it does


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Declares the operators when torchvision is imported, and not before: torch is heavy."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path)
        if found is None or found.loader is None:
            return found
        run = found.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            _declare_torchvision_operators()
            run(module)

        found.loader.exec_module = exec_module
        return found


def _stand_in_for_vllm() -> None:
    vllm, operators = types.ModuleType("vllm"), types.ModuleType("vllm._custom_ops")
    vllm.__path__ = []
    vllm.__spec__ = importlib.machinery.ModuleSpec("vllm", None, is_package=True)
    operators.__spec__ = importlib.machinery.ModuleSpec("vllm._custom_ops", None)
    operators.rotary_embedding = None
    vllm._custom_ops = operators
    sys.modules.setdefault("vllm", vllm)
    sys.modules.setdefault("vllm._custom_ops", operators)


sys.meta_path.insert(0, _BeforeTorchvision())
_stand_in_for_vllm()
