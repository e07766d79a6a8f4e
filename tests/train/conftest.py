# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""A toy model with a tokenizer of its own, and packed text, made once."""

import inspect
import json
from pathlib import Path

import pytest
import torch

from tests.e2e.tiny import VOCABULARY, save_llama
from vllm_sparse.train.build import Gathered, end_of_document, write
from vllm_sparse.train.corpus import tokenizer_hash
from vllm_sparse.train.sources import Source


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A Llama of 2,048 tokens' context and a byte-level BPE for its 512 ids."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    folder = save_llama(tmp_path_factory.mktemp("train") / "model")
    bpe = ByteLevelBPETokenizer()
    text = inspect.getsource(json.decoder)
    special = ["<|endoftext|>"]
    bpe.train_from_iterator(text.splitlines(), VOCABULARY, special_tokens=special)
    end = dict.fromkeys(("unk_token", "eos_token", "pad_token"), special[0])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **end).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def data_folder(model_folder, tokenizer, tmp_path_factory) -> Path:
    """A few modules, packed as prose and as code, to train on and held out."""
    import numpy as np

    folder = tmp_path_factory.mktemp("data")
    gathered = []
    for kind in ("prose", "code"):
        source = Source("toy", "PSF-2.0", "pip", kind, ("*",))
        modules = (json.decoder, json.encoder, inspect)
        ids = [np.array(tokenizer.encode(inspect.getsource(m))) for m in modules]
        train, held_out = [ids[2].astype(np.uint16)], [ids[0].astype(np.uint16)]
        gathered.append(Gathered(source, train=train, held_out=held_out))
    end = end_of_document(tokenizer)
    hashed = tokenizer_hash(model_folder)
    write(folder, gathered, 10**6, tokenizer=hashed, end_of_document=end)
    return folder


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
