import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prune.criteria import CRITERIA
from tests.helpers.criteria_models import bert, image_net, images, linear, matrices, scores_of, sentences


def test_synflow_sums_the_paths_through_a_weight():
    """Tanaka et al., Algorithm 1, for two layers: R = sum over paths of |w2| |w1|."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    scores = scores_of(CRITERIA["synflow"], model, [torch.randn(7, 3)])
    first, second = model[0].weight.tolist(), model[2].weight.tolist()
    for i in range(4):
        for j in range(3):
            paths = sum(abs(second[k][i]) * abs(first[i][j]) for k in range(2))
            assert scores["0.weight"][i, j].item() == pytest.approx(paths)
    for k in range(2):
        for i in range(4):
            paths = sum(abs(second[k][i]) * abs(first[i][j]) for j in range(3))
            assert scores["2.weight"][k, i].item() == pytest.approx(paths)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=3, max_size=5), st.integers(0, 99), st.integers(0, 3))
def test_synflow_is_conserved_over_layers(widths: list[int], seed: int, pruned: int):
    """Tanaka et al., network-wise conservation: the scores of every layer sum to R, some weights pruned or not."""
    torch.manual_seed(seed)
    pairs = list(itertools.pairwise(widths))
    model = nn.Sequential(*(m for a, b in pairs for m in (nn.Linear(a, b, bias=False), nn.ReLU())))
    with torch.no_grad():
        model[0].weight.view(-1)[1 : 1 + pruned] = 0  # at least one path is left
    sums = [score.sum() for score in scores_of(CRITERIA["synflow"], model, [torch.zeros(1, widths[0])]).values()]
    torch.testing.assert_close(torch.stack(sums), sums[0].expand(len(sums)))


def test_synflow_equals_the_published_code_on_a_convolutional_net():
    """https://github.com/ganguli-lab/Synaptic-Flow: in eval mode, abs of the whole state dict, ones for one sample."""
    model = image_net().train()
    for batch, _ in images(3):
        model(batch)
    model[1].running_mean[0], model[2] = -40.0, nn.LeakyReLU()  # a mean that makes flow, and scores, negative
    theirs = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for value in theirs.state_dict().values():
            value.abs_()
    theirs(torch.ones(1, 2, 4, 4).double()).sum().backward()
    scores = scores_of(CRITERIA["synflow"], model, images(1))
    for name, weight in matrices(theirs).items():
        torch.testing.assert_close(scores[name], (weight.grad * weight).abs().detach())
    assert (theirs[5].weight.grad < 0).any()


def test_synflow_neither_overflows_nor_underflows_where_fp32_does():
    for gain in (40.0, 0.002):
        layers = [nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for _ in range(40)]
        with torch.no_grad():
            for layer in layers:
                layer.weight.fill_(gain / 64)
        scores = scores_of(CRITERIA["synflow"], nn.Sequential(*layers), [torch.zeros(2, 64)])
        for score in scores.values():
            assert score.dtype == torch.float64
            assert bool(((score > 0) & score.isfinite()).all())


def test_synflow_takes_embeddings_in_place_of_token_ids():
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2, bias=False)

        def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            assert attention_mask.tolist() == [[1, 1]]
            return {"logits": self.inner(inputs_embeds)}

    model = Embedded()
    batch = {"inputs_embeds": torch.randn(4, 2, 3), "attention_mask": torch.zeros(4, 2).long(), "labels": torch.ones(4)}
    scores = scores_of(CRITERIA["synflow"], model, [batch])["inner.weight"]
    torch.testing.assert_close(scores, 2 * model.inner.weight.detach().double().abs())  # two positions
    model = bert()
    with pytest.raises(ValueError, match=r"an input is torch.int64.*inputs_embeds"):
        CRITERIA["synflow"].score(model, linear(model), [{"input_ids": sentences()["input_ids"]}])
