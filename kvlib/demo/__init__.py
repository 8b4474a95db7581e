# SPDX-License-Identifier: Apache-2.0
"""`kvlib demo`: a long prompt computed once, stored, and answered from in a second process."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvlib.demo.run import run_demo

__all__ = ["run_demo"]


def __getattr__(name: str) -> object:
    if name == "run_demo":
        return import_module("kvlib.demo.run").run_demo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
