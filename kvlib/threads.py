# SPDX-License-Identifier: Apache-2.0
"""Threads that work beside a model."""

import threading

import torch

__all__ = ["one_torch_thread"]


def one_torch_thread() -> None:
    """Let torch use one thread in the calling thread, and in others what it used before.

    A copy that torch splits among all cores waits for each of them at its end; beside a model that
    keeps the cores busy that takes many times as long as one thread takes alone.
    """
    before = torch.get_num_threads()
    # Not `torch.set_num_threads`, which vLLM replaces on CPUs. It sets two things: the number for
    # this thread, and the one that later threads begin with, which another thread sets back.
    set_threads = torch._C.set_num_threads
    set_threads(1)
    other = threading.Thread(target=set_threads, args=(before,))
    other.start()
    other.join()
