# SPDX-License-Identifier: Apache-2.0
import pytest

from kvlib.evals.tasks import Source
from kvlib.testing.models import tiny_model


@pytest.fixture(scope="session")
def text_model_folder(tmp_path_factory):
    """A tiny model with a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    tiny_model(vocab_size=256, eos_token_id=None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def source(text_model_folder):
    from transformers import AutoTokenizer

    return Source(AutoTokenizer.from_pretrained(text_model_folder), 256)
