"""`Monitor` of a model that is trained by two processes, by gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import attncap
from attncap import AlarmError, Monitor
from tests.trainable import SPEC, Layer, Net, batch, captured, scaled
from tests.two_processes import WORLD, found_by

KINDS = ("ddp", "ddp_inside", "fsdp1", "fsdp2")
MICRO = 2  # forwards per step and process


def batches(rank: int, step: int) -> list[Tensor]:
    """What a process is given in a step; not the same number of sequences on both."""
    return [batch(100 * step + 10 * micro + rank, size=1 + rank) for micro in range(MICRO)]


def wrapped(kind: str, mesh: Any) -> tuple[Any, Any]:
    """(the module to monitor, the module to call)."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model: Any = Net()
    if kind.startswith("ddp"):
        outer: Any = DistributedDataParallel(model)
        return (model if kind == "ddp_inside" else outer), outer
    if kind == "fsdp1":
        outer = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        return outer, outer
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, model


def trained(kind: str, rank: int, mesh: Any) -> dict[str, Any]:
    """Three steps of training, of which the first and the last are captured."""
    target, called = wrapped(kind, mesh)
    optimizer = torch.optim.SGD(called.parameters(), lr=0.0)  # so that a process alone can compute the same
    with Monitor(target, SPEC, every=2) as monitor:
        for step in range(3):
            for given in batches(rank, step):
                called(given).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
        with CountedCollectives() as counted:
            found = {"tensors": monitor.tensors(), "layers": monitor.layers, "first": list(counted)}
        with CountedCollectives() as counted:
            found |= {"report": monitor.report(heads=False), "then": list(counted)}
    return found


class CountedCollectives:
    """The names of the collectives that are called meanwhile."""

    def __enter__(self) -> list[str]:
        self._names: list[str] = []
        self._own = {name: getattr(distributed, name) for name in ("all_reduce", "all_gather_object")}
        for name, function in self._own.items():
            setattr(distributed, name, self._noting(name, function))
        return self._names

    def __exit__(self, *_: Any) -> None:
        for name, function in self._own.items():
            setattr(distributed, name, function)

    def _noting(self, name: str, function: Any) -> Any:
        def noting(*args: Any, **kwargs: Any) -> Any:
            self._names.append(name)
            return function(*args, **kwargs)

        return noting


class Staged(nn.Module):
    """Two layers, of which each call runs those it names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Net().layers

    def forward(self, hidden: Tensor, wanted: list[int]) -> Tensor:
        """(B, N, E) -> (B, N, E)."""
        for layer in wanted:
            hidden = self.layers[layer](hidden)
        return hidden


def in_stages(rank: int) -> dict[str, Any]:
    """Each process runs a layer of its own; later the second alone runs one that no process ran before."""
    model, found = Staged(), {}
    model.layers.append(Layer())
    with Monitor(model, SPEC) as monitor:
        model(batch(rank), [rank])
        monitor.step()
        found["apart"] = monitor.report(heads=False)
        monitor.reset()
        found["empty"] = monitor.report()
        model(batch(7), [0, 2] if rank else [0])
        monitor.step()
        found["later"] = monitor.report(heads=False)
    return found


def alarmed(rank: int) -> str:
    """A head of the second process alone is too large: both are told."""
    model = scaled(Net(), 1, 2, by=100.0) if rank else Net()
    with Monitor(model, SPEC, above={"max_logit": 50.0}, on_alarm="raise") as monitor:
        model(batch(0)).sum().backward()
        monitor.step()
        try:
            monitor.report()
        except AlarmError as error:
            return str(error)
    return ""


def work(rank: int) -> dict[str, Any]:
    """One process."""
    mesh = distributed.device_mesh.init_device_mesh("cpu", (WORLD,))
    found: dict[str, Any] = {kind: trained(kind, rank, mesh) for kind in KINDS}
    found |= {"in_stages": in_stages(rank), "alarmed": alarmed(rank)}
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """What each process found."""
    return found_by(work)


def everything() -> attncap.Capture:
    """A capture of what both processes were given in the steps that are captured."""
    return captured(Net(), *(given for step in (0, 2) for rank in range(WORLD) for given in batches(rank, step)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_process_has_the_numbers_of_all(found: list[dict[str, Any]], kind: str) -> None:
    cap = everything()
    for one in found:
        tensors = one[kind]["tensors"]
        assert one[kind]["layers"] == cap.layers
        for stat in cap.accumulator.stats:
            wanted = cap.accumulator.table("max_logit", "max") if stat == "max_logit" else cap.mean(stat)
            torch.testing.assert_close(tensors[stat], wanted, atol=1e-6, rtol=1e-5)
        highest = one[kind]["report"]["attention/max_logit/layers.1"]
        assert highest == pytest.approx(float(cap.accumulator.table("max_logit", "max")[1].max()), rel=1e-5)
    assert found[0][kind]["report"] == found[1][kind]["report"]


def test_everything_travels_in_one_vector_once_it_is_agreed_on(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["ddp"]["first"] == ["all_gather_object", "all_reduce"]
        assert one["ddp"]["then"] == ["all_reduce"]


def test_an_alarm_of_one_process_is_told_by_all(found: list[dict[str, Any]]) -> None:
    assert found[0]["alarmed"] == found[1]["alarmed"]
    assert "layers.1 head 2: max_logit is" in found[0]["alarmed"]


def test_processes_may_run_different_modules(found: list[dict[str, Any]]) -> None:
    apart, later = ([one["in_stages"][when] for one in found] for when in ("apart", "later"))
    assert apart[0] == apart[1]
    assert later[0] == pytest.approx(later[1], nan_ok=True)
    for rank in range(WORLD):
        cap = captured(Net().layers[rank], batch(rank))
        wanted = float(cap.mean("entropy").mean())
        assert apart[0][f"attention/entropy/layers.{rank}"] == pytest.approx(wanted, rel=1e-5)
    assert later[0]["attention/entropy/layers.2"] > 0
    assert [one["in_stages"]["empty"] for one in found] == [{}, {}]
