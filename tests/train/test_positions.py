"""Windows spread over positions, with gaps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_export.model import load_model
from tests.train.conftest import INDEXER, batch
from train import joint, warmup
from train.positions import GAPS, spread, with_gaps


@given(length=st.integers(2, 40), more=st.integers(1, 1000))
def test_a_window_is_spread_over_positions(length: int, more: int) -> None:
    positions = spread(50, length, length + more)
    steps = positions.diff(dim=1)
    assert positions[:, 0].eq(0).all() and positions.max() < length + more
    assert steps.min() >= 1 and (steps > 1).sum(1).max() <= GAPS
    assert length < 20 or more < 20 or (positions.diff(dim=0) != 0).any(), "every row has gaps of its own"


def test_gaps_have_any_place_and_size() -> None:
    torch.manual_seed(0)
    gaps = spread(200, 40, 1040).diff(dim=1) - 1
    total = gaps.sum(1)
    assert total.min() < 50 and total.max() > 950 and len(total.unique()) > 100
    assert (gaps > 0).sum(1).float().mean() > GAPS - 0.5
    share = (gaps.amax(1) / total)[total > 100]
    assert share.min() < 0.4 and share.max() > 0.8


def test_what_a_window_attends_to_is_what_its_positions_say(tiny: Path) -> None:
    model = load_model(tiny, **INDEXER)
    windows = [with_gaps(batch(), span) for span in (0, 400, 40)]
    near, far, again = (warmup.warmup_terms(model, window, 8)["kl"].item() for window in windows)
    assert again == near != pytest.approx(far, rel=1e-3)
    near, far, again = (joint.joint_terms(model, window, 8)["cross_entropy"].item() for window in windows)
    assert again == near != pytest.approx(far, rel=1e-3)
