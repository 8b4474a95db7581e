# SPDX-License-Identifier: Apache-2.0
"""Tasks: what a method is asked. One file a task; samples depend on task, length, seed and index.

Question-unaware compression is the strict reading and the default: the context is compressed before
any question is known. In question-aware compression a policy sees context and question together.
"""

from kvlib.evals.tasks.base import Question, Sample, Source, Task, make_sample
from kvlib.registry import MethodCall, Registry

__all__ = ["TASKS", "Question", "Sample", "Source", "Task", "build_task", "make_sample"]

TASKS: Registry[Task] = Registry(
    "tasks",
    {
        "copy": "kvlib.evals.tasks.copying:Copying",
        "labels": "kvlib.evals.tasks.labels:Labels",
        "needle": "kvlib.evals.tasks.needle:Needle",
        "recall": "kvlib.evals.tasks.recall:Recall",
        "records": "kvlib.evals.tasks.records:Records",
        "table": "kvlib.evals.tasks.table:Table",
        "text": "kvlib.evals.tasks.text:Text",
    },
)


def build_task(text: str | MethodCall) -> Task:
    """The task that a string (``name:key=value,...``) describes.

    Raises:
        ConfigError: the text is malformed, or a value is refused.
        UnknownPluginError: unknown name.
    """
    return TASKS.build(text)
