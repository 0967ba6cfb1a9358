"""MLPSpec, the flat MLP, and which modules and losses are recognised, with the reason if not."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hvpfast as hf
from hvpfast.mlp.spec import ACTIVATIONS

CE = nn.CrossEntropyLoss()


def test_spec_describes_the_parameters() -> None:
    spec = hf.MLPSpec([4, 5, 3])
    assert spec.sizes == (4, 5, 3)
    assert (spec.num_layers, spec.num_params) == (2, 4 * 5 + 5 + 5 * 3 + 3)
    assert spec.shapes == ((5, 4), (5,), (3, 5), (3,))
    assert spec.names == ("0.weight", "0.bias", "1.weight", "1.bias")
    without = hf.MLPSpec((4, 5, 3), bias=False)
    assert without.shapes == ((5, 4), (3, 5))
    assert without.names == ("0.weight", "1.weight")
    flat = torch.arange(float(spec.num_params))
    tensors = spec.unflatten(flat)
    assert [tuple(t.shape) for t in tensors] == list(spec.shapes)
    assert tensors[0].data_ptr() == flat.data_ptr(), "views, not copies"
    assert torch.equal(spec.flatten(tensors), flat)


def test_spec_is_a_key() -> None:
    spec = hf.MLPSpec((4, 3), "gelu", class_weights=(0.1, 0.2, 1 / 3), label_smoothing=0.1)
    assert hf.MLPSpec.from_key(spec.key) == spec
    assert hf.MLPSpec.from_key(spec.key) is hf.MLPSpec.from_key(spec.key)
    same = hf.MLPSpec([4, 3], "gelu", class_weights=[0.1, 0.2, 1 / 3], label_smoothing=0.1)
    assert same == spec
    assert hash(same) == hash(spec)
    assert spec != hf.MLPSpec((4, 3), "gelu")
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert copy.deepcopy(spec) == spec
    with pytest.raises(AttributeError):
        spec.bias = False  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sizes": (4,)}, "two or more widths"),
        ({"sizes": (4, 0, 3)}, "integers >= 1; got \\(4, 0, 3\\)"),
        ({"sizes": (4, 2.0)}, "integers >= 1"),
        ({"activation": "elu"}, "activation must be one of relu, .* got 'elu'"),
        ({"loss": "nll"}, "loss must be one of cross_entropy, mse"),
        ({"reduction": "none"}, "reduction must be one of mean, sum"),
        ({"bias": 1}, "bias must be True or False"),
        ({"class_weights": (1.0,)}, "class_weights must be 3 finite weights >= 0"),
        ({"class_weights": (1.0, -1.0, 1.0)}, "class_weights must be 3"),
        ({"class_weights": (1.0, float("nan"), 1.0)}, "class_weights must be 3"),
        ({"label_smoothing": 1.5}, "label_smoothing must be in \\[0, 1\\]"),
        ({"ignore_index": None}, "ignore_index must be an int"),
        ({"loss": "mse", "label_smoothing": 0.1}, "belong to loss='cross_entropy'"),
        ({"loss": "mse", "class_weights": (1.0, 1.0, 1.0)}, "belong to loss='cross_entropy'"),
    ],
)
def test_spec_rejects(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.MLPSpec(**{"sizes": (4, 3), **fields})  # type: ignore[arg-type]


def test_flatten_rejects_other_shapes() -> None:
    spec = hf.MLPSpec((4, 3))
    with pytest.raises(ValueError, match=r"flat must be \(15,\)"):
        spec.unflatten(torch.zeros(16))
    with pytest.raises(ValueError, match="tensors must have the shapes"):
        spec.flatten([torch.zeros(4, 3), torch.zeros(3)])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_is_the_sequential(activation: str, bias: bool) -> None:
    """Same initial values from the same seed, same outputs, same gradient, one parameter."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        mlp = hf.MLP((6, 5, 4, 3), activation, bias)
        torch.manual_seed(3)
        layers = [nn.Linear(d, e, bias=bias) for d, e in ((6, 5), (5, 4), (4, 3))]
    sequential = mlp.to_sequential()
    assert [name for name, _ in mlp.named_parameters()] == ["flat"]
    assert set(mlp.state_dict()) == {"flat"}
    for ours, theirs in zip(
        sequential.parameters(), nn.Sequential(*layers).parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mlp(x), sequential(x))
    mlp(x).square().sum().backward()
    sequential(x).square().sum().backward()
    spec = hf.spec_of(mlp, CE)
    gradients = [p.grad for p in sequential.parameters() if p.grad is not None]
    torch.testing.assert_close(mlp.flat.grad, spec.flatten(gradients))
    assert hf.spec_of(sequential, CE) == spec
    back = hf.MLP.from_sequential(sequential)
    assert torch.equal(back.flat, mlp.flat)
    assert (back.sizes, back.activation, back.bias) == (mlp.sizes, activation, bias)


def test_mlp_options() -> None:
    draws = [hf.MLP((3, 2), generator=torch.Generator().manual_seed(1)).flat for _ in range(2)]
    assert torch.equal(*draws)
    before = torch.get_rng_state()
    mlp = hf.MLP((3, 2), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(before, torch.get_rng_state())
    assert mlp.flat.dtype == torch.float64
    assert mlp.weights[0]._base is mlp.flat
    assert repr(mlp) == "MLP((3, 2), activation='relu', bias=True)"
    assert hf.MLP((3, 2), device="meta").flat.device.type == "meta"
    assert copy.deepcopy(mlp).flat.equal(mlp.flat)
    with pytest.raises(ValueError, match="activation must be one of"):
        hf.MLP((3, 2), "swish")
    with pytest.raises(ValueError, match="two or more widths"):
        hf.MLP((3,))


def test_params_are_the_modules_own() -> None:
    mlp = hf.MLP((3, 4, 2))
    assert hf.params_of(mlp) is mlp.flat
    sequential = mlp.to_sequential()
    params = hf.params_of(sequential)
    assert isinstance(params, list)
    assert all(a is b for a, b in zip(params, sequential.parameters(), strict=True))


def test_recognises_sequentials() -> None:
    act = nn.ReLU()  # one module used twice
    inner = nn.Sequential(nn.Linear(6, 5), act, nn.Identity(), nn.Dropout(0.0))
    model = nn.Sequential(nn.Flatten(), inner, nn.Linear(5, 4), act, nn.Linear(4, 3))
    spec = hf.spec_of(model, CE)
    assert spec == hf.MLPSpec((6, 5, 4, 3), "relu")
    dropout = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(), nn.Linear(5, 2)).eval()
    assert hf.spec_of(dropout, CE) == hf.MLPSpec((6, 5, 2), "tanh")
    linear = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    assert hf.spec_of(linear, CE) == hf.MLPSpec((6, 5, 2), "identity")
    assert hf.spec_of(nn.Linear(6, 2, bias=False), CE) == hf.MLPSpec((6, 2), "identity", bias=False)
    gelu = nn.Sequential(nn.Linear(6, 5), nn.GELU("tanh"), nn.Linear(5, 2))
    assert hf.spec_of(gelu, CE).activation == "gelu_tanh"


@pytest.mark.parametrize(
    ("loss_fn", "fields"),
    [
        (F.cross_entropy, {}),
        (F.mse_loss, {"loss": "mse"}),
        (nn.MSELoss(reduction="sum"), {"loss": "mse", "reduction": "sum"}),
        (functools.partial(F.mse_loss, reduction="sum"), {"loss": "mse", "reduction": "sum"}),
        (
            nn.CrossEntropyLoss(torch.tensor([0.5, 2.0]), ignore_index=1, label_smoothing=0.1),
            {"class_weights": (0.5, 2.0), "ignore_index": 1, "label_smoothing": 0.1},
        ),
        (
            functools.partial(F.cross_entropy, weight=torch.tensor([1.0, 3.0]), reduction="sum"),
            {"class_weights": (1.0, 3.0), "reduction": "sum"},
        ),
    ],
)
def test_recognises_losses(loss_fn, fields) -> None:  # type: ignore[no-untyped-def]
    assert hf.spec_of(hf.MLP((3, 2)), loss_fn) == hf.MLPSpec((3, 2), **fields)


def _linear(d_in: int = 3, d_out: int = 3, **options: bool) -> nn.Linear:
    return nn.Linear(d_in, d_out, **options)


def _shared() -> nn.Module:
    layer = _linear()
    return nn.Sequential(layer, nn.ReLU(), layer)


def _transposed() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.zeros(4, 3).T)
    return layer


def _with_hook() -> nn.Module:
    model = nn.Sequential(_linear(), nn.ReLU(), _linear())
    model[1].register_forward_hook(lambda *_: None)
    return model


class _Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: nn.Sequential(_linear(), nn.ReLU(), nn.Conv2d(1, 1, 1)), "layer 2 is Conv2d"),
        (lambda: nn.Sequential(nn.Sequential(nn.BatchNorm1d(3))), "layer 0.0 is BatchNorm1d"),
        (lambda: nn.Conv2d(1, 1, 1), "the model is Conv2d"),
        (lambda: _Residual(_linear()), "the model is _Residual"),
        (lambda: nn.Sequential(_linear(), nn.ELU(), _linear()), "layer 1 is ELU; an MLP is made"),
        (lambda: nn.Sequential(_linear(), nn.Softplus(2.0), _linear()), "layer 1 is Softplus"),
        (lambda: nn.Sequential(_linear(), nn.ReLU()), "ends in relu"),
        (lambda: nn.Sequential(nn.ReLU(), _linear()), "layer 0 is ReLU, which does not follow"),
        (
            lambda: nn.Sequential(_linear(), nn.ReLU(), nn.ReLU(), _linear()),
            "layer 2 is ReLU, which does not follow",
        ),
        (
            lambda: nn.Sequential(_linear(), nn.ReLU(), _linear(), nn.Tanh(), _linear()),
            r"mixes activations \(relu, tanh\)",
        ),
        (
            lambda: nn.Sequential(_linear(), nn.ReLU(), _linear(), _linear()),
            r"mixes activations \(identity, relu\)",
        ),
        (lambda: nn.Sequential(_linear(), _linear(bias=False)), "some Linear layers have a bias"),
        (lambda: nn.Sequential(_linear(), _linear(4)), "4 inputs follows one with 3 outputs"),
        (lambda: nn.Sequential(_linear(), nn.Dropout(0.5)), "Dropout in train mode.*model.eval"),
        (lambda: nn.Sequential(_linear(), nn.Flatten()), "begin with a plain Flatten"),
        (lambda: nn.Sequential(nn.Flatten(0), _linear()), "begin with a plain Flatten"),
        (lambda: nn.Sequential(nn.Flatten()), "no Linear layer"),
        (_shared, "share a parameter"),
        (_transposed, "not contiguous"),
        (_with_hook, "layer 1 is ReLU with hooks"),
        (lambda: nn.Sequential(_linear(), _linear().double()), "differ in dtype"),
    ],
)
def test_rejects_modules_with_the_reason(model, reason: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(hf.NotAnMLPError, match=reason):
        hf.spec_of(model(), CE)
    with pytest.raises(ValueError, match=reason):
        hf.params_of(model())


class _FocalLoss(nn.CrossEntropyLoss):
    pass


@pytest.mark.parametrize(
    ("loss_fn", "reason"),
    [
        (F.nll_loss, "the loss is nll_loss"),
        (_FocalLoss(), "the loss is _FocalLoss"),
        (lambda z, y: z.sum(), "the loss is <lambda>"),
        (nn.CrossEntropyLoss(reduction="none"), "the loss reduces by 'none'"),
        (functools.partial(F.mse_loss, weight=torch.ones(3)), "mse_loss with weight"),
        (functools.partial(F.cross_entropy, size_average=True), "arguments not known here"),
        (nn.CrossEntropyLoss(torch.ones(5)), "class_weights must be 3"),
    ],
)
def test_rejects_losses_with_the_reason(loss_fn, reason: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(hf.NotAnMLPError, match=reason):
        hf.spec_of(nn.Linear(3, 3), loss_fn)


def test_reduction_must_agree_with_the_loss() -> None:
    model = nn.Linear(3, 3)
    assert hf.spec_of(model, CE, "mean").reduction == "mean"
    with pytest.raises(ValueError, match="reduction='sum' was asked for, but the loss has 'mean'"):
        hf.spec_of(model, CE, "sum")
