# SPDX-License-Identifier: Apache-2.0
import pytest

from kvlib.evals.tasks import Source


@pytest.fixture(scope="session")
def source(text_model_folder):
    from transformers import AutoTokenizer

    return Source(AutoTokenizer.from_pretrained(text_model_folder), 256)
