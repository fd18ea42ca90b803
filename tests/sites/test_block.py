"""The body of a model as a site."""

import pytest
import torch

from loratory.sites import BlockSite, find_block
from tests.laws.bodies import BODIES, SIZES


@pytest.mark.parametrize(
    ("name", "heads", "head_dim", "causal", "places"),
    [
        ("Llama", 2, 4, True, None),
        ("Qwen3", 2, 8, True, None),
        ("GPT-2", 4, 4, True, (0, 40)),
        ("BERT", 4, 4, False, (0, 40)),
    ],
)
def test_what_a_site_tells(name, heads, head_dim, causal, places):
    site = find_block("body", BODIES[name]().base_model)
    assert isinstance(site, BlockSite)
    assert (site.kind, site.shape, site.vocabulary) == ("block", (16,), 37)
    assert (site.heads, site.head_dim, site.blocks) == (heads, head_dim, SIZES["num_hidden_layers"])
    assert (site.causal, site.places) == (causal, places)


def test_attention_blocks_are_the_innermost_ones():
    assert list(find_block("", BODIES["bare BERT"]()).attentions) == [
        "encoder.layer.0.attention.self",
        "encoder.layer.1.attention.self",
    ]


def test_there_is_no_matrix():
    site, x = find_block("body", BODIES["Llama"]().model), torch.zeros(1)
    for act in (
        site.read,
        lambda: site.write(x),
        lambda: site.apply(x, x),
        lambda: site.down(x, x),
        lambda: site.up(x, x),
    ):
        with pytest.raises(ValueError, match="'body' is the body of a model, which has no matrix"):
            act()


def test_a_second_table_of_tokens_is_refused():
    body = BODIES["Llama"]().model
    body.per_layer = torch.nn.Embedding(37, 3)
    with pytest.raises(ValueError, match=r"has a second table of tokens \('per_layer'\)"):
        find_block("body", body)
