"""Masks of packed and continued rows."""

import torch

from loratory.ops.masks import additive, causal_mask, document_numbers


def test_causal_mask_of_a_whole_and_of_a_continued_row():
    assert causal_mask(3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert causal_mask(2, 1).tolist() == [[True, True, False], [True, True, True]]


def test_documents():
    positions = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 5, 6, 7], [0, 0, 1, 0, 0]])
    numbers = document_numbers(positions)
    assert numbers.tolist() == [[0, 0, 0, 1, 1], [0] * 5, [0, 1, 1, 2, 3]]
    assert causal_mask(5, documents=numbers)[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_additive():
    for dtype in (torch.float32, torch.bfloat16):
        assert additive(torch.tensor([True, False]), dtype).tolist() == [0.0, torch.finfo(dtype).min]
