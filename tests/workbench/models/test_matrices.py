import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from workbench.models.matrices import Matrix, matrices, matrix_named, refusal


def old(norm: Any, layer: nn.Module, **arguments: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm of old says that it is
        return norm(layer, **arguments)


def only(layer: nn.Module) -> Matrix:
    (matrix,) = matrices(layer).values()
    return matrix


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.LSTM(3, 5), {"weight_ih_l0": [(5, 3)] * 4, "weight_hh_l0": [(5, 5)] * 4}),
        (nn.GRU(3, 5), {"weight_ih_l0": [(5, 3)] * 3, "weight_hh_l0": [(5, 5)] * 3}),
        (nn.RNN(3, 5), {"weight_ih_l0": [(5, 3)], "weight_hh_l0": [(5, 5)]}),
        (nn.LSTMCell(3, 5), {"weight_ih": [(5, 3)] * 4, "weight_hh": [(5, 5)] * 4}),
        (nn.GRUCell(3, 5), {"weight_ih": [(5, 3)] * 3, "weight_hh": [(5, 5)] * 3}),
        (
            nn.LSTM(3, 5, bidirectional=True, proj_size=2),
            {
                f"weight_{name}_l0{way}": shapes
                for way in ("", "_reverse")
                for name, shapes in (("ih", [(5, 3)] * 4), ("hh", [(5, 2)] * 4), ("hr", [(2, 5)]))
            },
        ),
        (nn.MultiheadAttention(4, 2), {"in_proj_weight": [(4, 4)] * 3, "out_proj.weight": [(4, 4)]}),
        (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True),
            {
                "q_proj_weight": [(4, 4)],
                "k_proj_weight": [(4, 3)],
                "v_proj_weight": [(4, 5)],
                "out_proj.weight": [(4, 4)],
            },
        ),
        (nn.Bilinear(2, 3, 4), {"weight": [(4, 2, 3)]}),
        (nn.Embedding(3, 4), {}),
        (nn.LayerNorm((3, 4)), {}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_matrices_of_layers(layer: nn.Module, expected: dict[str, Any]) -> None:
    found = {name: [tuple(shape) for shape in matrix.shapes()] for name, matrix in matrices(layer).items()}
    assert found == expected
    for name, matrix in matrices(layer).items():
        assert matrix.parameter is layer.get_parameter(name)
        assert vars(matrix_named(layer, name)) == vars(matrix)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(3, 5),
        hf.pytorch_utils.Conv1D(5, 3),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Bilinear(2, 3, 4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_back_is_the_inverse_of_turned(layer: nn.Module) -> None:
    matrix = only(layer)
    tensor = torch.randn(matrix.parameter.shape)
    assert torch.equal(matrix.back(matrix.turned(tensor)), tensor)
    assert matrix.turned(tensor).shape == matrix.turned_shape()


def experts(kind: Any, config: Any) -> dict[str, Matrix]:
    torch.manual_seed(0)
    model = kind(config(hidden_size=8, intermediate_size=12, num_local_experts=3, num_attention_heads=2, head_dim=4,
                        num_key_value_heads=2, num_hidden_layers=1, vocab_size=9))  # fmt: skip
    return {name.rpartition(".")[2]: each for name, each in matrices(model).items() if each.kind == "experts"}


def test_fused_experts_are_a_matrix_each_in_either_order() -> None:
    mixtral = experts(hf.MixtralModel, hf.MixtralConfig)
    assert mixtral["gate_up_proj"].shapes() == [[24, 8]] * 3
    assert (mixtral["gate_up_proj"].turned_shape(), mixtral["down_proj"].turned_shape()) == ((72, 8), (24, 12))
    gpt = experts(hf.GptOssModel, hf.GptOssConfig)
    assert gpt.keys() == {"gate_up_proj", "down_proj"}, "not their biases"
    assert (gpt["gate_up_proj"].turned_shape(), gpt["down_proj"].turned_shape()) == ((72, 8), (24, 12))
    tensor = torch.randn(3, 8, 24)
    turned = gpt["gate_up_proj"].turned(tensor)
    assert torch.equal(turned[24:48], tensor[1].T)
    assert torch.equal(gpt["gate_up_proj"].back(turned), tensor)


def test_experts_of_ones_own_may_not_tell_which_dimension_is_of_inputs() -> None:
    class Experts(nn.Module):
        def __init__(self, **sizes: Any) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(3, 8, 12)), nn.Parameter(torch.randn(3, 12, 8))
            vars(self).update(sizes)

    found = {sizes: matrices(Experts(**dict(sizes))) for sizes in ((), (("hidden_size", 8),), (("hidden_dim", 12),))}
    assert [[each.transposed for each in layer.values()] for layer in found.values()] == [
        [None, None],
        [True, True],
        [False, False],
    ]
    assert not matrices(Experts(is_transposed=False))["up"].transposed


class MoEViT(nn.Module):
    """A network named after its experts, which has other parameters of three dimensions."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.slots, self.prompt = nn.Parameter(torch.randn(1, 6, 8)), nn.Parameter(torch.randn(3, 1, 8))
        self.up, self.up_bias = nn.Parameter(torch.randn(3, 8, 12)), nn.Parameter(torch.randn(3, 4, 12))
        vars(self).update(sizes)


@pytest.mark.parametrize("sizes", [{}, {"num_experts": 3}])
def test_of_a_network_with_experts_only_their_weights_are_matrices(sizes: dict[str, int]) -> None:
    assert list(matrices(MoEViT(**sizes))) == ["up"]
    assert not matrices(MoEViT(num_experts=4)), "3 are no matrix for each of 4 experts"


# Parametrizations


def norms() -> dict[str, tuple[nn.Module, str]]:
    torch.manual_seed(0)
    return {
        "weight_norm of old": (old(weight_norm, nn.Linear(3, 5)), "weight_v"),
        "weight_norm of all": (old(weight_norm, nn.Linear(3, 5), dim=None), "weight_v"),
        "weight_norm": (parametrizations.weight_norm(nn.Conv2d(3, 5, 2)), "parametrizations.weight.original1"),
        "spectral_norm of old": (spectral_norm(nn.Linear(3, 5)), "weight_orig"),
        "spectral_norm": (parametrizations.spectral_norm(nn.Linear(3, 5)), "parametrizations.weight.original"),
    }


@pytest.mark.parametrize("name", norms())
def test_a_product_is_what_the_layer_multiplies_by(name: str) -> None:
    """And is zero where the parameter is, and looking at it changes nothing."""
    layer, parameter = norms()[name]
    matrix = only(layer)
    assert list(matrices(layer)) == [parameter]
    assert vars(matrix_named(layer, parameter)) == vars(matrix)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    product = matrix.product()
    layer.eval()
    layer(torch.ones(2, 3) if isinstance(layer, nn.Linear) else torch.ones(2, 3, 4, 4))
    torch.testing.assert_close(product, layer.weight.detach())  # type: ignore[union-attr]
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    mask = torch.rand(product.shape) < 0.5
    mask[:, 0] = True  # a norm of nothing would be NaN
    with torch.no_grad():
        matrix.parameter.mul_(mask)
    assert torch.equal(matrix.product() != 0, mask)


def test_slices_of_weight_norm_have_a_norm_each() -> None:
    assert only(norms()["weight_norm"][0]).slices(torch.zeros(5, 3, 2, 2)).shape == (5, 12)
    assert only(norms()["weight_norm of all"][0]).slices(torch.zeros(5, 3)).shape == (1, 15)
    columns = parametrizations.weight_norm(nn.Linear(3, 5), dim=1)
    assert only(columns).slices(torch.zeros(5, 3)).shape == (3, 5)


def test_one_of_the_matrices_of_a_recurrent_layer_may_be_under_a_norm() -> None:
    found = matrices(nn.Sequential(parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0")))
    assert list(found) == ["0.weight_ih_l0", "0.parametrizations.weight_hh_l0.original1"]
    assert [(each.parts, each.norm) for each in found.values()] == [(3, None), (3, 0)]


class Signed(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * weight.abs()


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def test_an_unknown_parametrization_is_tried() -> None:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Signed())
    assert only(layer).made_by == "Signed"
    for refused in (parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 4)):
        if not parametrize.is_parametrized(refused):
            parametrize.register_parametrization(refused, "weight", Symmetric())
        assert matrices(refused) == {}
        assert "whose result is not zero where this is" in refusal(refused, "parametrizations.weight.original")


def test_an_unknown_parametrization_is_tried_once_a_layer() -> None:
    calls = []

    class Counted(Signed):
        def forward(self, weight: Tensor) -> Tensor:
            calls.append(weight.shape)
            return super().forward(weight)

    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Counted())
    only(layer)
    calls.clear()
    only(layer)
    assert not calls
    parametrize.register_parametrization(layer, "weight", Symmetric())
    assert matrices(layer) == {}, "what was added since is tried"


def test_a_layer_under_the_pruning_of_torch_is_refused() -> None:
    layer = prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5)
    assert matrices(layer) == {}
    assert refusal(layer, "weight_orig") == "under torch.nn.utils.prune: call its remove() first"
    with pytest.raises(ValueError, match="'weight_orig' is no matrix of a layer that is known"):
        matrix_named(layer, "weight_orig")
