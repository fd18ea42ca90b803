"""A real small language model, and a tiny BERT with a word-piece tokenizer made on the spot."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, PreTrainedTokenizerFast

STORIES = Path(__file__).parents[1] / "models" / "stories260k"
PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "the",
    "card",
    "fee",
    "was",
    "ch",
    "##arged",
    "lost",
    "my",
    "is",
    "##s",
    ".",
]


@pytest.fixture(scope="session")
def stories():
    return AutoModelForCausalLM.from_pretrained(STORIES)


@pytest.fixture
def stories_tokenizer():
    return AutoTokenizer.from_pretrained(STORIES)


@pytest.fixture(scope="session")
def pieces_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=64, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture
def tiny_bert():
    def make(kind, **settings):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        return kind(BertConfig(vocab_size=len(PIECES), max_position_embeddings=64, **sizes, **settings)).eval()

    return make
