"""What inspection sees is what transformers computes; the page and the file hold all of it."""

import dataclasses
import html
import re

import jax
import numpy as np
import pytest
import torch
from exported import FAMILIES, OLMO2, TEXT, close, export, model_of, transformers_model

import olmo_jax
from olmo_jax import cli
from olmo_jax.convert.load import load_tokenizer
from olmo_jax.errors import UserError


@pytest.fixture(scope="module", params=["olmo2", pytest.param("pythia", marks=pytest.mark.slow)])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("inspected") / request.param
    return export(model_of(FAMILIES[request.param]), path)


def captured(theirs, ids, modules):
    """transformers' outputs: hidden states, logits, and each named module's (input, output)."""
    seen = {}

    def hook(name):
        def keep(module, args, out):
            out = out[0] if isinstance(out, tuple) else out
            seen[name] = (args[0][0].numpy() if args else None, out[0].numpy())

        return keep

    for name in modules:
        theirs.get_submodule(name).register_forward_hook(hook(name))
    with torch.no_grad():
        return theirs(torch.tensor([ids.tolist()]), output_hidden_states=True), seen


def test_everything_equals_transformers(folder):
    names = ("layers.*", "layers.*.mlp", "layers.1.attention", "embed", "final_norm")
    found = olmo_jax.inspect(folder, TEXT, top=7, activations=names)
    theirs = transformers_model(folder)
    olmo = theirs.config.model_type == "olmo2"
    base = "model" if olmo else "gpt_neox"
    attention, out = ("self_attn", "o_proj") if olmo else ("attention", "dense")
    modules = [f"{base}.layers.{i}.mlp" for i in range(3)] + [f"{base}.layers.1.{attention}"]
    modules += [f"{base}.layers.{i}.{attention}.{out}" for i in range(3)]
    result, seen = captured(theirs, found.ids_T, modules)

    # hidden_states: before the first layer, after each, the last one after the final norm.
    hidden = [h[0].numpy() for h in result.hidden_states]
    assert close(found.activations["embed"], hidden[0])
    assert close(found.activations["layers.0"], hidden[1])
    assert close(found.activations["layers.1"], hidden[2])
    assert close(found.activations["final_norm"], hidden[3])
    assert close(found.activations["layers.1.attention"], seen[f"{base}.layers.1.{attention}"][1])
    for i in range(3):
        assert close(found.activations[f"layers.{i}.mlp"], seen[f"{base}.layers.{i}.mlp"][1])
        module = f"{base}.layers.{i}.{attention}.{out}"
        context = seen[module][0].reshape(len(found.ids_T), 4, 8)
        W_DHC = theirs.get_submodule(module).weight.detach().numpy().reshape(32, 4, 8)
        written = np.einsum("thc,dhc->htd", context, W_DHC)
        assert close(found.attention_norms_LHT[i], np.linalg.norm(written, axis=-1))
    kept = {"embed", "final_norm", "layers.1.attention"}
    kept |= {f"layers.{i}{tail}" for i in range(3) for tail in ("", ".mlp")}
    assert set(found.activations) == kept

    log_probs = torch.log_softmax(result.logits[0], dim=-1)
    losses = -log_probs[:-1].gather(1, torch.tensor(found.ids_T[1:, None]).long())[:, 0]
    assert np.isnan(found.losses_T[0])
    assert np.allclose(found.losses_T[1:], losses, atol=1e-4)
    assert found.loss == pytest.approx(float(losses.mean()), abs=1e-5)
    assert np.allclose(found.entropies_T, -(log_probs.exp() * log_probs).sum(-1), atol=1e-4)
    top = log_probs.topk(7)
    assert np.allclose(found.top_log_probs_TK, top.values, atol=1e-4)
    assert np.array_equal(found.top_ids_TK, top.indices)


@pytest.mark.parametrize("folder", ["olmo2"], indirect=True)
def test_pieces_join_to_the_text_where_no_character_is_cut(folder):
    tokenizer, _ = load_tokenizer(folder)
    plain = TEXT.partition(" né")[0]
    found = olmo_jax.inspect(folder, plain)
    assert "".join(found.pieces) == plain
    model = olmo_jax.load(folder)
    by_ids = olmo_jax.inspect(model, found.ids_T.tolist())
    assert by_ids.pieces[0] == f"[{found.ids_T[0]}]"
    assert np.array_equal(by_ids.losses_T[1:], found.losses_T[1:])
    again = olmo_jax.inspect(model, plain, tokenizer=tokenizer)
    assert again.pieces == found.pieces


@pytest.mark.slow
def test_windows_experts_and_alibi_are_seen_too():
    """The walk gives the output of the model's own forward pass, whatever the layers are."""
    kinds = dict(window_pattern=(3, 0), n_experts=4, experts_per_token=2, position="alibi")
    model = model_of(dataclasses.replace(OLMO2, n_layers=2, norm_place="pre", **kinds))
    ids = np.arange(20) * 7 % 300
    found = olmo_jax.inspect(model, ids, activations=("final_norm", "layers.*.mlp"))
    hidden = jax.jit(lambda m, t: m.hidden(t))(model, ids[None])[0]
    assert close(found.activations["final_norm"], hidden)
    assert found.activations["layers.1.mlp"].shape == (20, 32)


@pytest.mark.parametrize("folder", ["olmo2"], indirect=True)
def test_the_command_writes_a_file_and_a_page(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("creeps <b>in</b> this & that né")
    model = str(folder)
    for out in ("x.npz", "x.html"):
        command = ["inspect", model, f"--file={text}", f"--out={tmp_path / out}", "--top=3"]
        assert cli.run(command) == 0
    shown = capsys.readouterr().out
    found = olmo_jax.inspect(model, text.read_text(), top=3)
    assert f"{found.loss:.3f}" in shown
    with np.load(tmp_path / "x.npz") as saved:
        assert np.array_equal(saved["losses"], found.losses_T, equal_nan=True)
        assert np.array_equal(saved["layers.2"], found.activations["layers.2"])
        assert np.array_equal(saved["attention_norms"], found.attention_norms_LHT)
        assert saved["pieces"].tolist() == found.pieces
    page = (tmp_path / "x.html").read_text()
    assert "http:" not in page and "https:" not in page
    assert "default-src 'none'" in page
    tokens = re.findall(r'<span class="token[^>]*>(.*?)<span class="tip">(.*?)</span></span>', page)
    assert "".join(html.unescape(t) for t, _ in tokens) == "".join(found.pieces)
    for t, (_, tip) in enumerate(tokens[1:]):
        assert f"{found.losses_T[t + 1]:.2f}" in tip
        for p in np.exp(found.top_log_probs_TK[t]):
            assert f"{p:.1%}" in tip


@pytest.fixture(scope="module")
def plain():
    return olmo_jax.init(dataclasses.replace(OLMO2, n_layers=2))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(text=[]), "has 0 tokens"),
        (dict(text=[1] * 129), "at most the model's context of 128"),
        (dict(text=[1, 9999]), "outside the vocabulary"),
        (dict(text="a"), "needs a tokenizer"),
        (dict(text=[1], top=0), "top = 0"),
        (dict(text=[1], activations=["layers.*.atention"]), "there are embed, layers.0,"),
    ],
)
def test_what_cannot_be_seen_is_refused(plain, arguments, words):
    with pytest.raises(UserError, match=re.escape(words)):
        olmo_jax.inspect(plain, **arguments)


def test_the_command_refuses_what_it_cannot_read_or_write(capsys):
    assert cli.run(["inspect", "nowhere", "--text=a", "--out=x.csv"]) == 2
    assert "x.csv" in capsys.readouterr().err
    assert cli.run(["inspect", "nowhere"]) == 2
    assert "--text" in capsys.readouterr().err
