"""Wrong trackers are found before the model is loaded; the other checks are tested in `test_train`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

from qdora import ConfigError
from qdora.preflight import check_trackers


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets trackers' packages be found or not, whatever is installed here."""
    packages = {"tensorboard", "tensorboardX", "trackio", "codecarbon", "comet_ml", "flytekit"}
    find = importlib.util.find_spec

    def install(*names: str) -> None:
        def find_spec(name: str, package: str | None = None) -> Any:
            if name in packages:
                return object() if name in names else None
            return find(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    return install


def test_no_tracker_is_no_fault() -> None:
    check_trackers([])


def test_an_installed_tracker_is_no_fault(installed: Callable[..., None]) -> None:
    installed("tensorboard", "trackio")
    check_trackers(["tensorboard", "trackio"])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tensorboard", "--report_to tensorboard needs the package tensorboard: pip install tensorboard"),
        ("trackio", "--report_to trackio needs the package trackio: pip install trackio"),
        ("flyte", "--report_to flyte needs the package flytekit: pip install flytekit"),
        ("comet_ml", "pip install comet-ml, and COMET_API_KEY in the environment"),
    ],
)
def test_a_missing_one_is_named_with_its_package(installed: Callable[..., None], name: str, sentence: str) -> None:
    installed("codecarbon")
    with pytest.raises(ConfigError, match=sentence):
        check_trackers(["codecarbon", name])


def test_an_unknown_one_is_answered_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"--report_to: tensorbord is not supported, only .*tensorboard.*wandb"):
        check_trackers(["tensorbord"])
