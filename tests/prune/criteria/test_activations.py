import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prune.criteria import CRITERIA
from tests.helpers.criteria_models import bert, linear, linear_norms, scores_of, sentences

CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(2, 3, (2, 3)), (2, 2, 4, 5)),
    "strided, padded, dilated": (nn.Conv2d(2, 3, 3, stride=2, padding=2, dilation=2), (2, 2, 6, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 4, 4)),
    "depthwise, same": (nn.Conv1d(3, 6, 3, padding="same", dilation=2, groups=3), (2, 3, 7)),
    "reflecting": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), (1, 2, 4, 4)),
    "unbatched": (nn.Conv1d(2, 3, 2), (2, 5)),
    "3d": (nn.Conv3d(1, 2, 2), (2, 1, 3, 3, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 3, 3)),
    "transposed 1d": (nn.ConvTranspose1d(2, 3, 3, padding=1, dilation=2), (2, 2, 5)),
}


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (3,)])
def test_wanda_of_a_linear_layer(shape: tuple[int, ...]):
    """Sun et al., equation 1: |W_ij| * ||X_j||_2."""
    torch.manual_seed(0)
    model, batches = nn.Linear(3, 2), [torch.randn(shape) for _ in range(3)]
    norms = linear_norms(batches)
    scores = scores_of(CRITERIA["wanda"], model, batches)["weight"]
    for i, row in enumerate(model.weight.tolist()):
        assert scores[i].tolist() == pytest.approx([abs(w) * norm for w, norm in zip(row, norms)])


def test_wanda_differs_from_the_published_running_mean_by_one_factor():
    """https://github.com/locuslab/wanda: scaler_row is the sum of squares over the number of sequences."""
    torch.manual_seed(0)
    model, batches = nn.Linear(3, 2), [torch.randn(2, 4, 3), torch.randn(3, 4, 3)]
    scaler, sequences = torch.zeros(3), 0
    for batch in batches:
        scaler *= sequences / (sequences + len(batch))
        sequences += len(batch)
        scaler += batch.reshape(-1, 3).norm(dim=0) ** 2 / sequences
    published = model.weight.detach().abs() * scaler.sqrt()
    torch.testing.assert_close(scores_of(CRITERIA["wanda"], model, batches)["weight"], published * 5**0.5)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_wanda_of_a_convolution_is_that_of_the_linear_map_it_is(kind: str):
    """Every weight times the root of the summed squares of all values that it is ever multiplied with.

    These are read off the layer itself: what one weight of 1 among zeros makes of x^2, summed over the output.
    """
    layer, shape = copy.deepcopy(CONVOLUTIONS[kind])
    layer, inputs = layer.double(), torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    scores = scores_of(CRITERIA["wanda"], layer, [inputs])["weight"]
    probe = copy.deepcopy(layer)
    nn.init.zeros_(probe.bias)
    for place in itertools.product(*map(range, layer.weight.shape)):
        with torch.no_grad():
            probe.weight.zero_()[place] = 1
            norm = probe(inputs.square()).sum().sqrt()
        assert scores[place].item() == pytest.approx((layer.weight[place].abs() * norm).item())


@given(st.floats(0.01, 100), st.integers(0, 2), st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_wanda_sees_no_difference_between_a_scaled_input_and_a_scaled_weight(factor: float, column: int, parts: int):
    torch.manual_seed(0)
    model, inputs = nn.Linear(3, 2).double(), torch.randn(6, 3).double()
    before = scores_of(CRITERIA["wanda"], model, [inputs])["weight"]
    with torch.no_grad():
        model.weight[:, column] /= factor
        inputs[:, column] *= factor
    after = scores_of(CRITERIA["wanda"], model, inputs.chunk(parts))["weight"]  # nor between batches
    torch.testing.assert_close(after, before)


def test_wanda_leaves_out_padding():
    """The same scores as from each sentence alone, cut to its length; the pooler sees first tokens only."""
    model, batch = bert(), sentences()
    batch["input_ids"][1, 2:] = 7  # whatever stands there
    alone = [{"input_ids": batch["input_ids"][:1]}, {"input_ids": batch["input_ids"][1:, :2]}]
    weights = linear(model)
    together, apart = (CRITERIA["wanda"].score(model, weights, loader) for loader in ([batch], alone))
    blind = CRITERIA["wanda"].score(model, weights, [{"input_ids": batch["input_ids"]}])
    for name in weights:
        torch.testing.assert_close(together[name], apart[name])
    inner = "bert.encoder.layer.0.intermediate.dense.weight"
    assert not torch.allclose(blind[inner], apart[inner])


def test_wanda_of_conv1d_is_that_of_its_transpose():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer, twin, inputs = Conv1D(5, 3), nn.Linear(3, 5), torch.randn(2, 4, 3)
    with torch.no_grad():
        twin.weight.copy_(layer.weight.T)
    ours, theirs = (scores_of(CRITERIA["wanda"], each, [inputs])["weight"] for each in (layer, twin))
    torch.testing.assert_close(ours, theirs.T)


def test_wanda_leaves_out_padding_of_positions_in_a_row():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, values: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(values.flatten(0, 1))

    torch.manual_seed(0)
    model, values = Flat(), torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    found = scores_of(CRITERIA["wanda"], model, [{"values": values, "attention_mask": mask}])["layer.weight"]
    norms = torch.tensor(linear_norms([values[0], values[1, 2:]]))
    torch.testing.assert_close(found, model.layer.weight.detach().abs() * norms)
