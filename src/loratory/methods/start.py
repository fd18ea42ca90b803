"""Starts of low-rank factors that several methods share."""

import math

import torch

from loratory.methods.method import new
from loratory.sites.site import Site


def low_rank_start(site: Site, rank: int, start: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B with B A = 0: A random and B zero; for an embedding, whose A is a table of rows, the other way round.

    kaiming: uniform(-1/sqrt(in), 1/sqrt(in)); gaussian: normal with standard deviation 1/rank.
    """
    A, B = new(site, *site.stack, rank, site.inputs), new(site, *site.stack, site.outputs, rank)
    if site.one_hot:
        return A.zero_(), B.normal_(generator=site.generator)
    if start == "gaussian":
        return A.normal_(std=1 / rank, generator=site.generator), B.zero_()
    bound = 1 / math.sqrt(site.inputs)
    return A.uniform_(-bound, bound, generator=site.generator), B.zero_()
