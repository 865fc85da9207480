"""What is read of a model's LM head, what is refused, and what a run does then."""

import math

import pytest
import torch
import transformers
from test_model_features import HEADS, build, sequences
from tiny import make_model

import fastalign
from fastalign.rows.model_head import HeadRefused, model_head, plain_layer
from fastalign.train import PackedCausalLM, UserError, load_tokenizer, train, train_dpo


class LoraLinear(torch.nn.Module):
    """As tuners wrap a layer."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = (
            base,
            torch.nn.Linear(32, 2, bias=False),
            torch.nn.Linear(2, 300, bias=False),
        )
        self.weight = base.weight

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class OwnForward(torch.nn.Linear):
    """A linear layer by its type, and something else by what it does."""

    def __init__(self, base):
        super().__init__(32, 300, bias=False)
        self.weight = base.weight

    def forward(self, x):
        return super().forward(x) * 2.0


class Bounded(transformers.LlamaForCausalLM):
    """Does something to its logits of which its configuration says nothing."""

    def forward(self, position_ids=None, **options):
        output = super().forward(position_ids=position_ids, **options)
        output.logits = output.logits.clamp(max=50.0)
        return output


class Forbidding(transformers.LlamaForCausalLM):
    """Gives some tokens no probability, as models do that read images."""

    def forward(self, position_ids=None, **options):
        output = super().forward(position_ids=position_ids, **options)
        output.logits = output.logits.index_fill(-1, torch.tensor([17, 250]), -1e4)
        return output


class Twice(transformers.LlamaForCausalLM):
    """Makes its logits from two hidden states."""

    def forward(self, position_ids=None, **options):
        states = self.model(position_ids=position_ids, **options)[0]
        return transformers.modeling_outputs.CausalLMOutput(
            logits=self.lm_head(states) + 0.5 * self.lm_head(states.tanh())
        )


def changed(change, *arguments):
    """A model whose head is what `change` makes of it."""
    model = make_model()
    head = change(model.lm_head, *arguments)
    if isinstance(head, torch.nn.Module):
        model.set_output_embeddings(head)
    return model


REFUSED = {
    "a tuner layer": (lambda: changed(LoraLinear), "an adapter changes its LM head .LoraLinear."),
    "another forward pass": (
        lambda: changed(OwnForward),
        "its LM head is no plain linear layer .OwnForward.",
    ),
    "a hook": (
        lambda: changed(torch.nn.Module.register_forward_hook, lambda *a: a[2] * 2),
        "hooks hang on its LM head",
    ),
    "a limit": (
        lambda: Bounded(make_model().config),
        "it does something to its logits that its configuration does not name",
    ),
    "forbidden tokens": (lambda: Forbidding(make_model().config), "it cannot run without its own logits"),
    "two products": (
        lambda: Twice(make_model().config),
        "it runs its LM head 2 times in a forward pass, not once",
    ),
}


@pytest.mark.parametrize("make, words", REFUSED.values(), ids=REFUSED)
def test_what_is_not_a_scaled_product_is_refused(make, words):
    """By default its own logits are used, and why; asked for, it is an error."""
    batch = fastalign.pack(sequences(12, 30))
    torch.manual_seed(0)
    lm = PackedCausalLM(make(), head=None)
    plain = PackedCausalLM(lm.model)
    assert lm.head_used == "logits" and lm.head_note
    found, wanted = (each.scores(batch).stats(batch.labels).logprob for each in (lm, plain))
    assert torch.equal(found, wanted)
    with pytest.raises(UserError, match=f"--head fused: .*{words}.*; --head logits trains it"):
        PackedCausalLM(make(), head="fused")
    assert all("forward" not in vars(module) for module in lm.model.modules())


def stored(dtype, *shape):
    head = make_model().lm_head
    head.weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.uint8).to(dtype), requires_grad=False)
    return head


class Packed(torch.Tensor):
    """A type of its own that says it was fp32, as quantised weights do."""


def disguised():
    head = make_model().lm_head
    head.weight = torch.nn.Parameter(torch.zeros(300, 32).as_subclass(Packed))
    return head


QUANTISED = {
    "4 bits": lambda: stored(torch.uint8, 4800, 1), "8 bits": lambda: stored(torch.int8, 300, 32),
    "fp8": lambda: stored(torch.float8_e4m3fn, 300, 32), "a type of its own": disguised,
}  # fmt: skip


@pytest.mark.parametrize("make", QUANTISED.values(), ids=QUANTISED)
def test_quantised_weights_are_refused(make):
    with pytest.raises(
        HeadRefused,
        match=r"its LM head is quantised \(Linear: .*\); legal: fp32, bf16, fp16, fp64 of \[V, H\]",
    ):
        plain_layer(changed(lambda head: make()))


def test_a_head_that_is_no_layer_is_refused():
    with pytest.raises(HeadRefused, match="its LM head is no linear layer .Sequential."):
        plain_layer(changed(torch.nn.Sequential))
    with pytest.raises(HeadRefused, match="LlamaModel does not say which module is its LM head"):
        plain_layer(make_model().model)


def test_a_head_that_is_not_in_memory_is_refused():
    with pytest.raises(HeadRefused, match="not in memory"):
        plain_layer(changed(lambda head: torch.nn.Linear(32, 300, bias=False, device="meta")))


class ModulesToSave(torch.nn.Module):
    """As adapters keep a trained copy of a module."""

    def __init__(self, base, active=("default",)):
        super().__init__()
        self.original_module, self.disable_adapters, self.active_adapters = base, False, list(active)
        self.modules_to_save = torch.nn.ModuleDict(
            {name: torch.nn.Linear(32, 300) for name in ("default", "other")}
        )

    def forward(self, x):
        chosen = (
            self.original_module if self.disable_adapters else self.modules_to_save[self.active_adapters[0]]
        )
        return chosen(x)


def test_an_adapters_own_head_is_used():
    model = changed(ModulesToSave)
    wrapper = model.get_output_embeddings()
    for disabled, module in ((False, wrapper.modules_to_save["default"]), (True, wrapper.original_module)):
        wrapper.disable_adapters = disabled
        head = model_head(model)
        assert head.module is module and head.bias is module.bias
    with pytest.raises(HeadRefused, match="several adapters keep an LM head .default, other."):
        plain_layer(changed(ModulesToSave, ("default", "other")))


READ = [("gemma2", 1.0, 3.0), ("cohere", 0.0625, None), ("granite", 0.125, None), ("gemma3", 1.0, None)]


@pytest.mark.parametrize("name, scale, softcap", READ, ids=[name for name, *_ in READ])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_and_softcap_are_read(name, scale, softcap, dtype):
    """By the reader alone, of the model as it is."""
    model = HEADS[name]().to(dtype)
    head = model_head(model)
    assert (head.logit_scale, head.softcap) == (scale, softcap)
    assert head.weight is model.lm_head.weight and "forward" not in vars(model.lm_head)


class Transformed(transformers.LlamaForCausalLM):
    """Scales its logits, then caps them."""

    scale, softcap = 1.0, None

    def forward(self, position_ids=None, **options):
        output = super().forward(position_ids=position_ids, **options)
        output.logits = output.logits * self.scale
        if self.softcap is not None:
            output.logits = self.softcap * torch.tanh(output.logits / self.softcap)
        return output


@pytest.mark.parametrize("name, value, scale", [
    ("logit_scale", 0.25, 0.25), ("logits_scaling", 4.0, 0.25), ("logits_scaling", 0.25, 0.25), ("lm_head_multiplier", 0.25, 0.25),
    ("output_multiplier", 0.25, 0.25), ("attention_multiplier", 0.25, None),
])  # fmt: skip
@pytest.mark.parametrize(
    "softcap", [None, "final_logit_softcapping", "logits_soft_cap", "attn_logit_softcapping"]
)
def test_the_names_of_scales_and_softcaps(name, value, scale, softcap):
    """Of several models; a number under another name is not taken for one of the head."""
    model = Transformed(make_model().config)
    setattr(model.config, name, value)
    model.scale = 0.25
    if softcap is not None:
        setattr(model.config, softcap, 5.0)
        model.softcap = 5.0
    if scale is None or softcap == "attn_logit_softcapping":
        with pytest.raises(HeadRefused, match="that its configuration does not name"):
            model_head(model)
    else:
        assert model_head(model)[1:] == (scale, model.softcap)


def test_a_number_that_the_model_does_not_use_is_not_used():
    """The configuration is believed only where the model does what it says."""
    model = make_model()
    model.config.logit_scale, model.config.final_logit_softcapping = 0.5, 30.0
    assert model_head(model)[1:] == (1.0, None)


def test_a_model_that_fails_is_as_it_was():
    model = make_model()
    lm, batch = PackedCausalLM(model, head="fused"), fastalign.pack(sequences(12, 30))
    model.model.norm.register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lm.scores(batch)
    assert all("forward" not in vars(module) for module in model.modules())


# --- what a run does with a model whose head is refused -----------------------------------------------------


def test_a_run_says_why_it_makes_logits(config, capsys):
    tokenizer, bounded = load_tokenizer(config().model), lambda: Bounded(make_model().config)
    with pytest.raises(UserError, match="--head fused: Bounded: it does something to its logits"):
        train_dpo(config(model=None, head="fused"), model=bounded(), tokenizer=tokenizer)
    assert not config().output_dir().exists()
    first = train_dpo(config(model=None, max_steps=1), model=bounded(), tokenizer=tokenizer).history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert (
        capsys.readouterr().out.count(
            "head: logits (it does something to its logits that its configuration does not name"
        )
        == 1
    )


def test_logprob_fn_takes_logits(config, capsys):
    def logprobs(logits, labels):
        return (
            logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1).where(labels >= 0, 0)
        )

    train_dpo(config(token_metrics=False, max_steps=1), logprob_fn=logprobs)
    assert "head: logits\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="logprob_fn takes logits, which --head fused does not make"):
        train_dpo(config(token_metrics=False, head="fused", overwrite=True), logprob_fn=logprobs)


@pytest.mark.parametrize("method, reference, words", [
    ("dpo", lambda: changed(torch.nn.Module.register_forward_hook, lambda *a: a[2] * 2), "the reference model: hooks hang on its LM head"),
    ("tdpo", lambda: build("Cohere", logit_scale=0.5), "the reference model: it scales or caps its logits in another way"),
])  # fmt: skip
def test_policy_and_reference_go_the_same_way(
    config, tmp_path, capsys, monkeypatch, method, reference, words
):
    """Where the reference's head is refused, or cannot be compared with the policy's, both make logits."""
    folder, own = tmp_path / "reference", reference()
    own.save_pretrained(folder)
    load_tokenizer(config().model).save_pretrained(folder)
    load = fastalign.train.models.packed.load_model
    monkeypatch.setattr(
        "fastalign.train.models.packed.load_model",
        lambda d, **options: own if str(d) == str(folder) else load(d, **options),
    )
    with pytest.raises(UserError, match=f"--head fused: .*{words.split(': ')[1]}"):
        train(method, config(ref_model=str(folder), head="fused"))
    result = train(method, config(ref_model=str(folder), max_steps=1))
    assert f"head: logits ({words}" in capsys.readouterr().out and math.isfinite(result.metrics["loss"])
