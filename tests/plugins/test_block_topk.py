"""BlockTopK: the overlap sum against its definition, and the torch form and the ONNX body against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.block_topk import block_importance, block_topk, block_topk_reference
from tests.plugins import bodies


@settings(max_examples=60, deadline=None)
@given(
    stride=st.integers(1, 4),
    overlapping=st.integers(1, 4),
    stripes=st.integers(1, 5),
    tokens=st.integers(1, 70),
    seed=st.integers(0, 2**16),
)
def test_importance_is_the_overlap_of_the_blocks(stride, overlapping, stripes, tokens, seed):
    """Bug of the notebook: its sum is one stride off. Here: token ranges, intersected one by one."""
    block, selection = overlapping * stride, stripes * stride
    rows = tokens // stride + 2
    ends = [(r + 1) * stride for r in range(rows)]
    whole = torch.tensor([end - block >= 0 and end <= tokens for end in ends])
    p = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) * whole
    expected = [
        sum(
            float(p[r]) * len(set(range(ends[r] - block, ends[r])) & set(range(j * selection, (j + 1) * selection)))
            for r in range(rows)
        )
        / stride
        for j in range(-(-rows // stripes))
    ]
    torch.testing.assert_close(block_importance(p, block, stride, selection), torch.tensor(expected))


@pytest.mark.parametrize("case", [(1, 9, 12, 4), (2, 1, 30, 5), (2, 40, 10, 3), (1, 100, 25, 7)])
def test_torch_and_the_onnx_body_equal_the_reference(case):
    H, S, J, blocks = case
    g = torch.Generator().manual_seed(J)
    importance = torch.randint(0, 4, (2, H, S, J), generator=g).float()  # many ties
    lengths = torch.tensor([S + 3, J * 4])
    expected = block_topk_reference(importance, lengths, blocks, 4).sort(-1).values
    assert torch.equal(block_topk(importance, lengths, blocks, 4).sort(-1).values, expected)
    body = bodies.run("BlockTopK", [importance.numpy(), lengths.numpy()], blocks=blocks, block_size=4)
    assert torch.equal(torch.from_numpy(body).sort(-1).values, expected)


def test_first_and_local_blocks_are_always_in_and_the_future_never():
    importance = torch.zeros(1, 1, 1, 20)
    importance[..., 7] = importance[..., 15:] = 1.0
    indices = block_topk(importance, torch.tensor([50]), 4, 4)[0, 0, 0]  # position 49, in block 12
    wanted = [*range(4), *range(28, 32), *range(44, 48), 48, 49]
    assert sorted(i for i in indices.tolist() if i >= 0) == wanted


def test_fewer_blocks_than_asked_for():
    indices = block_topk(torch.zeros(1, 2, 5, 2), torch.tensor([5]), 16, 4)
    assert indices.shape == (1, 2, 5, 64)
    for t in range(5):
        assert sorted(i for i in indices[0, 1, t].tolist() if i >= 0) == list(range(t + 1))


@pytest.mark.parametrize(
    ("importance", "lengths", "blocks"),
    [
        (torch.zeros(1, 1, 1, 9), torch.tensor([9]), 2),
        (torch.zeros(1, 1, 9), torch.tensor([9]), 3),
        (torch.zeros(2, 1, 1, 9), torch.tensor([9]), 3),
        (torch.zeros(1, 1, 1, 9, dtype=torch.float64), torch.tensor([9]), 3),
    ],
)
def test_what_does_not_fit_is_refused(importance, lengths, blocks):
    with pytest.raises(ValueError, match="need "):
        block_topk(importance, lengths, blocks, 4)
