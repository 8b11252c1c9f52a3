"""The table that says which layer takes which path."""

import pytest
import torch

import hf_models
import warpdecode.hf


def test_every_layer_has_a_row_with_its_sizes_path_and_reason():
    model = hf_models.build("qwen3_moe", implementation="grouped_mm").requires_grad_(False)
    rows = warpdecode.hf.explain(model)
    assert [row.name for row in rows] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    first = rows[0]
    assert (first.module_class, first.E, first.H, first.I) == ("Qwen3MoeExperts", 8, 64, 32)
    assert (first.dtype, first.device) == ("float32", "cpu")
    assert (first.path, first.reason) == ("grouped_mm", "it is not patched; the kernels can serve it")
    warpdecode.hf.patch(model)
    assert {(row.path, row.reason) for row in warpdecode.hf.explain(model)} == {("warp_decode", "patched")}
    model.requires_grad_(True)
    assert "calls with grad mode on take grouped_mm" in warpdecode.hf.explain(model)[0].reason
    model.double()
    assert warpdecode.hf.explain(model)[0].path == "grouped_mm"
    assert "float64" in warpdecode.hf.explain(model)[0].reason


def test_what_it_says_is_what_happens():
    warpdecode.hf.register()
    model = hf_models.build("qwen3_5_moe_vlm", implementation="warp_decode")
    hf_models.experts_modules(model)[1].act_fn = torch.nn.Tanh()
    rows = warpdecode.hf.explain(model)
    assert [row.path for row in rows] == ["warp_decode", "grouped_mm"]
    assert rows[0].reason.startswith("asked for by name") and "gate" in rows[1].reason
    warns = pytest.warns(warpdecode.hf.WarpDecodeFallbackWarning, match="gate")
    with torch.no_grad(), hf_models.counted_kernel_calls() as served, warns:
        model(hf_models.prompt())
    assert len(served) == 1


def test_it_changes_nothing():
    model = hf_models.build("qwen3_moe")
    before = [(id(m.__dict__.get("config")), set(m.__dict__)) for m in model.modules()]
    with hf_models.no_fallback():
        warpdecode.hf.explain(model)
    assert before == [(id(m.__dict__.get("config")), set(m.__dict__)) for m in model.modules()]


def test_layers_outside_the_interface_and_other_layouts_are_listed():
    from transformers import GptOssConfig, Llama4TextConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    gpt_oss = GptOssConfig(hidden_size=32, intermediate_size=48, num_local_experts=4)
    gpt_oss._experts_implementation = "eager"
    llama4 = Llama4TextConfig(hidden_size=32, intermediate_size=48, num_local_experts=4)
    separate = torch.nn.ModuleDict({"experts": torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(4)])})
    model = torch.nn.ModuleDict({"a": GptOssExperts(gpt_oss), "b": Llama4TextMoe(llama4), "c": separate})
    torch.nn.init.ones_(model["b"].experts.down_proj)  # the other projection is zeros as it comes
    by_name = {row.name: row for row in warpdecode.hf.explain(model)}
    assert set(by_name) == {"a", "b.experts", "c.experts"}
    assert (by_name["a"].E, by_name["a"].H, by_name["a"].I, by_name["a"].path) == (4, 32, 48, "eager")
    assert by_name["b.experts"].path == by_name["c.experts"].path == "its own forward"
    assert (by_name["b.experts"].E, by_name["b.experts"].H, by_name["b.experts"].I) == (4, 32, 48)
    assert "zeros on a probe" in by_name["b.experts"].reason and by_name["c.experts"].E is None
    assert "three Linears" in by_name["c.experts"].reason


def test_weights_on_the_meta_device_are_described():
    with torch.device("meta"):
        model = hf_models.FAMILIES["qwen3_moe"]()
        model = model[0](model[1])
    row = warpdecode.hf.explain(warpdecode.hf.unpatch(model))[0]
    assert (row.device, row.E) == ("meta", 8) and "meta" in row.reason


def test_the_printed_table_folds_equal_layers():
    model = hf_models.build("qwen3_moe", implementation="grouped_mm").requires_grad_(False)
    warpdecode.hf.patch(model)
    explanation = warpdecode.hf.explain(model)
    header, row, summary = str(explanation).splitlines()
    assert header.split() == ["layers", "class", "E", "H", "I", "dtype", "device", "path", "reason"]
    assert row.split() == [
        "model.layers.{0..1}.mlp.experts", "(2)", "Qwen3MoeExperts", "8", "64", "32", "float32", "cpu", "warp_decode",
        "patched",
    ]  # fmt: skip
    assert summary == "2 of 2 layers take warp_decode."
    assert repr(explanation) == str(explanation)
    warpdecode.hf.unpatch(model.model.layers[1])
    assert len(str(warpdecode.hf.explain(model)).splitlines()) == 4
    assert str(warpdecode.hf.explain(torch.nn.Linear(8, 8))) == "No Mixture-of-Experts layers."


def test_folded_names_say_which_layers():
    from warpdecode.hf.explain import Explanation, LayerRow

    names = [f"model.layers.{i}.mlp.experts" for i in (1, 2, 3, 7, 9, 10)]
    rows = [LayerRow(name, "X", 8, 64, 32, "bfloat16", "cuda:0", "warp_decode", "patched") for name in names]
    assert Explanation(rows).folded()[0][0] == "model.layers.{1..3,7,9..10}.mlp.experts (6)"
    odd = [LayerRow(name, "X", 8, 64, 32, "", "", "", "") for name in ("a.experts", "b.deep.experts")]
    assert Explanation(odd).folded()[0][0] == "a.experts and 1 more"


def test_the_notebook_table_is_escaped_html():
    from warpdecode.hf.explain import Explanation, LayerRow

    table = Explanation([LayerRow("<b>", "X & Y", None, 64, 32, "", "", "eager", "a < b")])._repr_html_()
    assert "&lt;b&gt;" in table and "X &amp; Y" in table and "a &lt; b" in table and "<b>" not in table
    assert table.startswith("<table>") and '<td style="text-align:left">?</td>' in table
