"""`fastalign merge`: what merge_weights makes of state dicts, made of directories, whole or not at all."""

import json
import shlex
import shutil

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer

from fastalign.cli import main as cli
from fastalign.train import TrainingError, UserError, merge_weights
from fastalign.train import merge_files as merging
from fastalign.train.merge_files import MergeConfig, run

SMALL = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Directories base, one and other: `one` in several files, all with a tokenizer."""
    folder = tmp_path_factory.mktemp("shop")
    for seed, name in enumerate(("base", "one", "other")):
        make_model(seed=seed, **SMALL).save_pretrained(
            folder / name, max_shard_size="4KB" if name == "one" else "1GB"
        )
        make_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def config(shop, tmp_path):
    def build(**settings):
        models = [str(shop / "one"), str(shop / "other")]
        return MergeConfig(
            **{
                "base": str(shop / "base"),
                "models": models,
                "output": str(tmp_path / "out"),
                "progress": False,
                **settings,
            }
        )

    return build


def weights(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(folder, expected):
    found = weights(folder)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    "method, options, shares",
    [
        ("linear", {}, None),
        ("task_arithmetic", {}, [0.3, -0.5]),
        ("ties", {"density": 0.4}, [2.0, 1.0]),
        ("dare", {"density": 0.4, "seed": 3}, None),
        ("dare_ties", {"seed": 5}, None),
        ("slerp", {"t": 0.3}, None),
    ],
)
def test_directories_are_merged_as_state_dicts(shop, config, method, options, shares, capsys):
    base, one, other = (weights(shop / name) for name in ("base", "one", "other"))
    models = [str(shop / "one"), str(shop / "other")]
    given = models if shares is None else [f"{path}={share}" for path, share in zip(models, shares)]
    done = run(config(method=method, models=given, **options))
    same(done.output, merge_weights(base, [one, other], method=method, weights=shares, **options))
    assert done.parameters == sum(weight.numel() for weight in base.values())
    assert f"merging: {method} of 2 models" in capsys.readouterr().out
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (done.output / name).read_bytes() == (shop / "base" / name).read_bytes()
    assert json.loads((done.output / "merge.json").read_text())["method"] == method


def test_files_of_a_size(shop, config, tmp_path):
    """Neither the files that the weights come from nor those they go to matter."""
    whole = run(config(method="dare", output=str(tmp_path / "whole")))
    parts = run(config(method="dare", models=[str(shop / "one"), str(shop / "other")], max_shard_size="6KB"))
    files = sorted(path.name for path in parts.output.glob("*.safetensors"))
    assert len(files) > 2 and files[0].endswith(f"-of-{len(files):05d}.safetensors")
    index = json.loads((parts.output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == 4 * whole.parameters
    same(parts.output, weights(whole.output))
    with safe_open(parts.output / files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_dtypes(shop, config, tmp_path):
    """A base in 16 bits and models in 32 are merged in 32; the result is the base's dtype, or the one asked
    for."""
    half = tmp_path / "half"
    transformers.AutoModelForCausalLM.from_pretrained(shop / "base", dtype=torch.bfloat16).save_pretrained(
        half
    )
    base = {name: weight.bfloat16() for name, weight in weights(shop / "base").items()}
    tuned = [weights(shop / name) for name in ("one", "other")]
    stored = load_file(run(config(base=str(half))).output / "model.safetensors")
    assert all(torch.equal(stored[name], each) for name, each in merge_weights(base, tuned).items())
    done = run(config(base=str(half), dtype="float32", output=str(tmp_path / "wide")))
    stored = load_file(done.output / "model.safetensors")
    wide = merge_weights({name: each.float() for name, each in base.items()}, tuned)
    assert all(torch.equal(stored[name], each) for name, each in wide.items())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(done.output, dtype="auto")
    assert loaded.dtype == torch.float32


def test_tied_weights(config, tmp_path):
    """One weight of two names stands under both, or under one of them; it is merged once."""
    paths = [tmp_path / name for name in ("t0", "t1", "t2")]
    for seed, path in enumerate(paths):
        make_model(seed=seed, tie_word_embeddings=True, **SMALL).save_pretrained(path)
    for path in paths[:2]:  # as some models are published
        stored = load_file(path / "model.safetensors")
        assert "lm_head.weight" not in stored
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
        save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    done = run(config(base=str(paths[0]), models=[str(path) for path in paths[1:]], method="dare"))
    base, *tuned = (weights(path) for path in paths)
    merged = weights(done.output)
    for name, each in merge_weights(base, tuned, method="dare").items():
        if name != "lm_head.weight":
            assert torch.equal(merged[name], each)
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert "lm_head.weight" not in load_file(done.output / "model.safetensors")


def altered(folder, target, **changes):
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


def test_what_is_refused(shop, config, tmp_path):
    """In one line that names the directory, before anything is written."""

    def refused(words, **settings):
        with pytest.raises(UserError, match=words) as caught:
            run(config(**settings))
        assert len(str(caught.value).splitlines()) == 1
        assert not list(tmp_path.glob("**/.out*")) and not (tmp_path / "out").exists()

    one = str(shop / "one")
    refused("--base is missing", base=None)
    refused("--model is missing", models=())
    refused("--output is missing", output=None)
    refused("the model directory .*nowhere does not exist", models=["nowhere"])
    refused("--model .*one=much: expected DIR or DIR=WEIGHT, and 'much' is no number", models=[f"{one}=much"])
    refused("a weight is nan", models=[f"{one}=nan"])
    refused("density is given, and linear has none", density=0.5)
    refused("slerp takes two models", method="slerp", models=[one])
    refused("--max-shard-size is 'large'", max_shard_size="large")
    refused("--output .* holds --base", output=str(shop / "base"))
    refused("--output .* holds --base", output=str(shop))

    wide = tmp_path / "wide"
    make_model(**{**SMALL, "intermediate_size": 12}).save_pretrained(wide)
    refused("wide: model.layers.0.mlp.* is 8 x 12, in the base 8 x 8|is 12 x 8", models=[str(wide)])
    deep = tmp_path / "deep"
    make_model(**{**SMALL, "num_hidden_layers": 2}).save_pretrained(deep)
    refused(r"deep: it has the weight model.layers.1.* and the base has not", models=[str(deep)])
    refused(r"one: the base has the weight model.layers.1.* and it has not", base=str(deep))
    refused(
        "its model_type is mistral, the base's llama",
        models=[str(altered(shop / "one", tmp_path / "m", model_type="mistral"))],
    )
    refused(
        "its tie_word_embeddings is True, the base's False",
        models=[str(altered(shop / "one", tmp_path / "tied", tie_word_embeddings=True))],
    )
    quantised = {"quant_method": "gptq", "bits": 4}
    refused(
        "its weights are quantised",
        models=[str(altered(shop / "one", tmp_path / "q", quantization_config=quantised))],
    )
    whole = tmp_path / "whole"
    shutil.copytree(shop / "other", whole)
    stored = load_file(whole / "model.safetensors")
    save_file(
        {**stored, "model.norm.weight": stored["model.norm.weight"].long()}, whole / "model.safetensors"
    )
    refused("whole: model.norm.weight is floating point in one", models=[str(whole)])
    (whole / "model.safetensors").write_bytes(b"nonsense")
    refused("whole: its weights cannot be read", models=[str(whole)])
    (whole / "model.safetensors").unlink()
    refused("whole: it holds neither model.safetensors nor", models=[str(whole)])
    (whole / "adapter_config.json").write_text("{}")
    refused("whole: it is an adapter", models=[str(whole)])
    parts = tmp_path / "parts"
    shutil.copytree(shop / "one", parts)
    next(parts.glob("*.safetensors")).unlink()
    refused("parts: its weights cannot be read", models=[str(parts)])
    strange = tmp_path / "strange"
    shutil.copytree(shop / "other", strange)
    text = (strange / "tokenizer.json").read_text().replace('"<s>"', '"<t>"')
    (strange / "tokenizer.json").write_text(text)
    refused("strange: its tokenizer differs from the base's", models=[str(strange)])


def test_whole_or_not_at_all(config, tmp_path, monkeypatch):
    """A merge that breaks off leaves nothing; one that was made is replaced only when it is asked for, and nothing
    else ever is."""
    calls = []

    def full(*arguments, **options):
        calls.append(arguments)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(merging, "save_file", full)
        with pytest.raises(TrainingError, match="cannot write the merged model .*: No space left on device"):
            run(config())
    assert calls and not list(tmp_path.iterdir())
    done = run(config())
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not (done.output / "run.lock").exists()
    with pytest.raises(
        UserError, match="--output .*out holds .*; --overwrite replaces what an earlier merge"
    ):
        run(config())
    before = weights(done.output)
    run(config(method="task_arithmetic", overwrite=True))
    assert not torch.equal(weights(done.output)["lm_head.weight"], before["lm_head.weight"])
    (done.output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="--output .*out holds notes.txt: choose another directory$"):
        run(config(overwrite=True))
    foreign = tmp_path / "foreign"
    make_model(**SMALL).save_pretrained(foreign)
    with pytest.raises(UserError, match="foreign holds config.json: choose another directory$"):
        run(config(output=str(foreign), overwrite=True))


def test_the_command(shop, tmp_path, capsys, monkeypatch):
    words = ["merge", "--base", str(shop / "base"), "--output", str(tmp_path / "out"), "--no-progress"]
    assert cli.main([*words, "--model", f"{shop / 'one'}=0.25", "--method", "task_arithmetic"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "weights 0.25" in out[0] and out[1].startswith("merged: ") and len(out) == 2
    assert cli.main([*words, "--model", str(shop / "one")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastalign merge: error: --output ") and len(error.splitlines()) == 1
    monkeypatch.chdir(tmp_path)
    for name, model in (("base", "base"), ("sft", "one"), ("dpo", "other")):
        shutil.copytree(shop / model, name)
    assert cli.main(shlex.split(merging._EXAMPLE)[1:]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["merge", "--help"])
    shown = capsys.readouterr().out
    assert all(f"  {method} " in shown for method in ("linear", "slerp")) and merging._EXAMPLE in shown
