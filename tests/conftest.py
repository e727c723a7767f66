"""What all tests share. Triton's kernels are interpreted, on the CPU; Triton must know before it is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests import cuda_model as model_of_gpu
from tests import tiny, trained


@pytest.fixture(scope="session")
def cuda_native() -> ModuleType:
    """The CUDA kernels on the model of a GPU."""
    return model_of_gpu.build(model_of_gpu.FOLDER)


@pytest.fixture
def cuda_model(cuda_native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Inside the test impl="cuda" runs on the model of a GPU, with tensors on the CPU."""
    cuda_native.set_seed(0)
    model_of_gpu.install(cuda_native, monkeypatch)
    return cuda_native


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tiny.CommandHost]:
    """Runs the command in processes of its own."""
    host = tiny.CommandHost(tmp_path_factory.mktemp("host") / "log")
    yield host
    host.close()


@pytest.fixture(scope="session")
def induction_model() -> Any:
    """See `tests.trained`."""
    return _one_thread(trained.induction_model)


@pytest.fixture(scope="session")
def clean_classifier() -> Any:
    """See `tests.trained`."""
    return _one_thread(lambda: trained.classifier(backdoor=False))


@pytest.fixture(scope="session")
def backdoored() -> Any:
    """See `tests.trained`."""
    return _one_thread(lambda: trained.classifier(backdoor=True))


@pytest.fixture(scope="session")
def digits_model() -> Any:
    """See `tests.trained`."""
    return _one_thread(trained.digits_model)


@pytest.fixture(scope="session")
def digit_runs(tmp_path_factory: pytest.TempPathFactory, digits_model: Any) -> tuple[Path, Path]:
    """See `tests.digit_runs.make_digit_runs`."""
    from tests.digit_runs import make_digit_runs

    return make_digit_runs(tmp_path_factory.mktemp("digits"), digits_model)


def _one_thread(train: Callable[[], Any]) -> Any:
    """Trains alike whatever the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train()
    finally:
        torch.set_num_threads(before)
