"""Which sizes hold where."""

from __future__ import annotations

import torch

from qdora.workspace import ACCELERATOR, CPU, Workspace, assume, workspace_of


def test_by_device() -> None:
    assert workspace_of(torch.device("cpu")) is CPU
    assert workspace_of(torch.device("cuda")) is ACCELERATOR


def test_assumed_ones_hold_within() -> None:
    small = Workspace(1024)
    with assume(small):
        with assume(ACCELERATOR):
            assert workspace_of(torch.device("cpu")) is ACCELERATOR
        assert workspace_of(torch.device("cuda")) is small
    assert workspace_of(torch.device("cpu")) is CPU
