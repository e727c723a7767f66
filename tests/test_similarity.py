"""Jensen-Shannon distances from tiles equal those of the maps; groups and points against known answers and SciPy's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attncap.analysis import clusters, coordinates, head_distances, row_blocks, similarity
from tests import handmade

pytest.importorskip("transformers")

from tests import maps, models


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Nats of two distributions, by its definition: the mean of two Kullback-Leibler divergences."""
    middle = (p + q) / 2
    return sum(torch.where(one > 0, one * (one / middle).log(), 0.0).sum() for one in (p, q)) / 2


def distances_of_maps(layers: list[Tensor], smoothing: float) -> Tensor:
    """(H, H) of maps (H, N, N), all layers' heads, summed over rows."""
    heads = torch.cat(layers).double()
    heads = (1 - smoothing) * heads + smoothing / heads.shape[-1]
    return torch.stack([torch.stack([divergence(a, b) for b in heads]) for a in heads])


@pytest.mark.parametrize("smoothing", [0.0, 0.001])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["bert", "albert", "llama", "mistral", "gemma2", "modernbert"])
def test_distances_are_those_of_the_maps(kind, padding, smoothing, monkeypatch):
    monkeypatch.setattr(row_blocks, "_BLOCK", 200)  # a few rows a tile
    model = models.text_model(kind)
    batch = models.tokens(3, 9, 5, padding)
    kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    with torch.no_grad():
        attentions = maps.eager(model)(**batch, output_attentions=True).attentions
    expected = sum(
        distances_of_maps([layer[row][:, keeps][..., keeps] for layer in attentions], smoothing)
        for row, keeps in enumerate(kept)
    )
    found = head_distances(model, [batch], smoothing=smoothing)
    torch.testing.assert_close(found.total, expected, atol=2e-5, rtol=1e-4)
    assert found.rows == int(kept.sum())
    assert [head for _, head in found.heads] == [0, 1, 2, 3] * len(attentions)


def test_a_learned_sink_is_an_outcome_of_its_own():
    model, batch = models.text_model("gpt_oss"), models.tokens(1, 7, 2)
    with torch.no_grad():
        attentions = maps.eager(model)(**batch, output_attentions=True).attentions
    whole = [torch.cat([layer[0], 1 - layer[0].sum(-1, keepdim=True)], -1) for layer in attentions]
    found = head_distances(model, [batch])
    torch.testing.assert_close(found.total, distances_of_maps(whole, 0.0), atol=2e-5, rtol=1e-4)


def test_heads_that_never_look_at_the_same_key_are_log_2_apart():
    found = head_distances(handmade.InductionModel(), [handmade.repeated(2, 0), handmade.repeated(1, 1)])
    previous, itself = (
        found.heads.index((f"layers.{layer}", head)) for layer, head in (handmade.PREVIOUS, handmade.ITSELF)
    )
    rows = found.rows
    # The first token of each of the three sequences sees nothing but itself.
    assert float(found.total[previous, itself]) == pytest.approx((rows - 3) * math.log(2))
    assert float(found.mean.max()) <= math.log(2)
    assert torch.equal(found.total, found.total.T)
    assert (found.total.diagonal() == 0).all()


def test_batches_add_up_and_layers_are_chosen():
    model = models.text_model("bert")
    one, other = models.tokens(2, 6, 1), models.tokens(1, 9, 2)
    both = head_distances(model, [one, other])
    torch.testing.assert_close(both.total, head_distances(model, [one]).total + head_distances(model, [other]).total)
    second = head_distances(model, [one, other], layers=[1])
    # The first layer's own attention runs there, which rounds otherwise.
    torch.testing.assert_close(second.total, both.total[4:, 4:], atol=1e-5, rtol=1e-5)
    assert second.heads == both.heads[4:]


def test_a_model_of_several_kinds_of_attention():
    """SigLIP's vision tower goes through Transformers' registry, its pooling head through torch's module."""
    model = models.siglip()
    pixels = {"pixel_values": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        attentions = maps.eager(model)(**pixels, output_attentions=True).attentions
    found = head_distances(model, [pixels], layers=["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"])
    expected = sum(distances_of_maps([layer[row] for layer in attentions], 0.0) for row in range(2))
    torch.testing.assert_close(found.total, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("batches", "smoothing", "message"),
    [([], 0.0, "batches: expected some with rows"), ([], 1.0, "smoothing: expected")],
)
def test_wrong_arguments_of_distances_are_named(batches, smoothing, message):
    with pytest.raises(ValueError, match=message):
        head_distances(models.text_model("bert"), batches, smoothing=smoothing)


def test_distances_of_no_layer_are_refused():
    with pytest.raises(ValueError, match="layers: expected some"):
        head_distances(models.text_model("bert"), [models.tokens(1, 6, 1)], layers=[])


def test_layers_of_other_tokens_cannot_be_compared():
    batch = models.tokens(1, 6, 1)
    with pytest.raises(ValueError, match="heads can be compared where they are the same"):
        head_distances(models.bart(), [{**batch, "decoder_input_ids": batch["input_ids"][:, :3]}])


def test_no_map_is_made():
    """However long the sequence, as few rows are taken at a time as fit the room of a tile."""
    largest = []

    def noting(prob: Tensor) -> Tensor:
        largest.append(prob.numel())
        return own(prob)

    own = similarity._divergences
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "_divergences", noting)
        patch.setattr(row_blocks, "_BLOCK", 1000)
        for length in (16, 32):
            head_distances(models.text_model("bert"), [models.tokens(1, length, 1)])
    assert max(largest) <= 1000 + 8 * 32  # the null outcome is a key more


def three_groups() -> Tensor:
    """Distances of seven points on a line, in three groups."""
    points = torch.tensor([0.0, 9.0, 0.5, 20.0, 9.5, 0.2, 21.0], dtype=torch.float64)
    return (points[:, None] - points).abs()


def test_clusters_are_the_groups_that_are_there():
    assert clusters(three_groups(), 3).tolist() == [0, 1, 0, 2, 1, 0, 2]
    assert clusters(three_groups(), 7).tolist() == list(range(7))
    assert clusters(three_groups(), 1).tolist() == [0] * 7


def test_clusters_are_those_of_scipys_average_linkage():
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    distance = pytest.importorskip("scipy.spatial.distance")
    points = torch.rand(24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distances = torch.cdist(points, points)
    condensed = distance.squareform(distances.numpy(), checks=False)
    for number in (2, 5, 11):
        theirs = hierarchy.fcluster(hierarchy.linkage(condensed, "average"), number, "maxclust")
        ours = clusters(distances, number)
        assert len({*zip(ours.tolist(), theirs.tolist(), strict=True)}) == number


def test_points_in_the_plane_keep_their_distances():
    points = torch.rand(9, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    distances = torch.cdist(points, points)
    found = coordinates(distances)
    torch.testing.assert_close(torch.cdist(found, found), distances)
    torch.testing.assert_close(found.mean(0), torch.zeros(2, dtype=torch.float64))
    assert (coordinates(distances, 4)[:, 2:].abs() < 1e-6).all()


@pytest.mark.parametrize("function", [clusters, coordinates])
def test_wrong_distances_are_named(function):
    with pytest.raises(ValueError, match=r"distances: expected \(heads, heads\)"):
        function(torch.ones(2, 3), 2)
    with pytest.raises(TypeError, match="distances: expected a tensor, got list"):
        function([[0.0]], 1)
    with pytest.raises(ValueError, match="expected from 1 to 2, got 3"):
        function(torch.ones(2, 2), 3)
    with pytest.raises(ValueError, match="distances: expected finite numbers"):
        function(torch.full((2, 2), torch.nan), 2)
