"""Families of transformers whose experts are not of the standard layout: what their own classes compute in float64."""

from types import SimpleNamespace

import pytest
import torch

import warpdecode
from cases import error_bound, relative_error

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("error")

E, K, H, INTER, T = 6, 2, 48, 40, 9


def own_class(family, name):
    """A class of transformers; the test is skipped where the installed release lacks it."""
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, name, None) or pytest.skip(f"this transformers has no {name}")


def built(family, name, **config):
    """The class's module with fresh float32 numbers in float64 parameters, of the size that makes gates of order 1."""
    module = own_class(family, name)(SimpleNamespace(**config), **({"swiglu_limit": 0.75} if "Step3" in name else {}))
    for own_name, parameter in module.named_parameters():
        scale = 0.5 if own_name.endswith("bias") else min(H, INTER) ** -0.5
        parameter.data = (torch.randn(parameter.shape) * scale).double()
    return module


def tokens(top_k=K):
    """(hidden_states, topk_ids, topk_weights) in float32 numbers."""
    return torch.randn(T, H), torch.rand(T, E).argsort(dim=1)[:, :top_k].contiguous(), torch.rand(T, top_k)


def own_result(module, x, ids, weights):
    """The class's forward as it was written, without the choice of an implementation."""
    forward = getattr(type(module).forward, "__wrapped__", type(module).forward)
    with torch.no_grad():
        return forward(module, x.double(), ids, weights.double())


def check(found, expected):
    """Close to the class's own float64 result, which comes from the same float32 numbers."""
    assert expected.norm() > 0.1
    assert relative_error(found, expected) <= error_bound(expected, torch.float32)


SILU = {"hidden_act": "silu"}
SIZES = {"num_local_experts": E, "hidden_size": H, "intermediate_size": INTER, "moe_intermediate_size": INTER}
CLAMPED = {"activation": "silu", "limit": 0.75}
OSS = {"alpha": 1.702, "limit": 0.75, "up_offset": 1.0}


@pytest.mark.parametrize(
    ("family", "name", "config", "properties"),
    [
        (
            "gpt_oss",
            "GptOssExperts",
            {"swiglu_alpha": 1.702, "swiglu_limit": 0.75},
            {**OSS, "is_transposed": True, "is_interleaved": True},
        ),
        ("minimax_m3_vl", "MiniMaxM3VLExperts", {"swiglu_alpha": 1.702, "swiglu_limit": 0.75}, OSS),
        ("deepseek_v4", "DeepseekV4Experts", {**SILU, "swiglu_limit": 0.75}, CLAMPED),
        ("hy_v4", "HYV4Experts", {"swiglu_limit": 0.75}, CLAMPED),
        ("step3p7", "Step3p7Experts", SILU, {**CLAMPED, "clamp_after_activation": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gated_classes(family, name, config, properties):
    module = built(family, name, **SIZES, **config)
    call = tokens()
    weights = {p: value.float() for p, value in module.state_dict().items()}
    biases = {"gate_up_bias": weights.get("gate_up_proj_bias"), "down_bias": weights.get("down_proj_bias")}
    found = warpdecode.moe(*call, weights["gate_up_proj"], weights["down_proj"], **biases, **properties)
    check(found, own_result(module, *call))


def test_nemotron_h():
    module = built(
        "nemotron_h",
        "NemotronHExperts",
        n_routed_experts=E,
        hidden_size=H,
        moe_intermediate_size=INTER,
        moe_latent_size=None,
        mlp_hidden_act="relu2",
    )
    call = tokens()
    up, down = module.up_proj.data.float(), module.down_proj.data.float()
    check(warpdecode.moe(*call, up, down, activation="relu2", has_gate=False), own_result(module, *call))


def test_dbrx():
    """Two projections of [E * I, H] and one whose expert is [I, H], not transposed to [H, I]."""
    config = {"ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": INTER, "hidden_size": H, "moe_num_experts": E}
    module = built("dbrx", "DbrxExperts", **config)
    call = tokens()
    w1, v1, w2 = (getattr(module.mlp, name).data.float().view(E, INTER, H) for name in ("w1", "v1", "w2"))
    found = warpdecode.moe(*call, w1, w2, up_proj=v1, is_transposed="down")
    with torch.no_grad():
        expected = module(call[0].double()[:, None], call[1], call[2].double())[:, 0]
    check(found, expected)


def test_llama4():
    """The block repeats every token for every expert, weighted by its score, which is zero where it was not chosen."""
    module = built("llama4", "Llama4TextExperts", **SIZES, **SILU)
    x, ids, weights = tokens(top_k=1)
    scores = torch.zeros(T, E, dtype=torch.float64).scatter_(1, ids, weights.double())
    with torch.no_grad():
        routed = module(x.double().repeat(E, 1) * scores.t().reshape(-1, 1))
    gate_up, down = module.gate_up_proj.data.float(), module.down_proj.data.float()
    found = warpdecode.moe(x, ids, weights, gate_up, down, is_transposed=True, weight_on_input=True)
    check(found, routed.reshape(E, T, H).sum(0))


def test_one_linear_an_expert():
    """Lists of weights, as the experts of transformers 4 have them."""
    linears = [[torch.nn.Linear(*size, bias=True) for _ in range(E)] for size in ((H, INTER), (H, INTER), (INTER, H))]
    gate, up, down = ([linear.weight for linear in of] for of in linears)
    gate_bias, up_bias, down_bias = ([linear.bias for linear in of] for of in linears)
    biases = {"gate_up_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
    x, ids, weights = tokens()
    with torch.no_grad():
        found = warpdecode.moe(x, ids, weights, gate, down, up_proj=up, **biases)
        expected = torch.zeros(T, H, dtype=torch.float64)
        for of in linears:
            for linear in of:
                linear.double()
        for t in range(T):
            for k in range(K):
                g, u, d = (of[ids[t, k]] for of in linears)
                state = x[t].double()
                expected[t] += weights[t, k].double() * d(torch.nn.functional.silu(g(state)) * u(state))
    check(found, expected)
