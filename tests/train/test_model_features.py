"""Features of models that packing could break without a sound: what depends on the whole batch, what the head
does, what the router asks for."""

import copy

import pytest
import torch
import transformers
from tiny import make_lists, make_model, make_responses, make_rows

import fastalign
from fastalign.train import OnlineConfig, PackedCausalLM, TrainConfig, UserError, train, train_online
from fastalign.train.data.examples import pack_examples
from fastalign.train.data.tokenise import token_pair
from fastalign.train.methods import make_method
from fastalign.train.methods.base import Split
from fastalign.train.models.packed import Lengths
from fastalign.train.offline import accumulate

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 16.0, 64.0],
    "original_max_position_embeddings": 32,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
STATIC = {"factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}


def build(kind, **options):
    """A model with random weights that attends to something in particular."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2 and len(weight) != 300:
                weight.mul_(4.0)
    return model


def phi3(**options):
    return build("Phi3", rope_parameters=LONGROPE, original_max_position_embeddings=32, **options)


def dynamic():
    return build("Llama", rope_parameters=DYNAMIC, max_position_embeddings=32)


def mixtral(coefficient=0.5, asked=True, kind="ForCausalLM"):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SIZES,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
        router_aux_loss_coef=coefficient,
        output_router_logits=asked,
    )
    return getattr(transformers, f"Mixtral{kind}")(config)


def sequences(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 300, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def largest_change(make, attention, lengths):
    """The largest change of logits from those of a model that was given this sequence and nothing before
    it."""
    lm, rows = PackedCausalLM(make(), attention=attention), sequences(*lengths)
    found = lm.logits(fastalign.pack(rows)).split(list(lengths))
    alone = [make()(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, alone))


@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("make", [phi3, dynamic], ids=["longrope", "dynamic"])
@pytest.mark.parametrize("lengths", [(12, 80), (80, 12), (12, 80, 20, 64, 33, 32, 31)], ids=str)
def test_scaled_positions_are_those_of_the_sequence(make, attention, lengths):
    assert largest_change(make, attention, lengths) < 1e-5


@pytest.mark.parametrize("make", [phi3, dynamic], ids=["longrope", "dynamic"])
@torch.no_grad()
def test_the_negative_control(make):
    """Given as they are, long neighbours change the short sequence: the comparison above can fail."""
    model, (short, long) = make(), sequences(12, 80)
    batch = fastalign.pack([short, long])
    model.set_attn_implementation("eager")
    whole = model(
        input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False
    ).logits[0, :12]
    assert (whole - make()(input_ids=short[None]).logits[0]).abs().max() > 1e-2 * whole.abs().max()


def test_scaled_positions_of_copies_and_gradients():
    """The frozen copy looks at its own embeddings; a gradient passes; nothing stays behind on the model."""
    lm, batch = PackedCausalLM(phi3()), fastalign.pack(sequences(12, 80))
    twin = lm.frozen_copy()
    assert torch.equal(twin.logits(batch), lm.logits(batch))
    alone = PackedCausalLM(phi3())
    lm.logits(batch)[:12].logsumexp(-1).sum().backward()
    alone.logits(fastalign.pack(sequences(12))).logsumexp(-1).sum().backward()
    for mine, other in zip(lm.model.parameters(), alone.model.parameters()):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
    assert all("forward" not in vars(module) for module in lm.model.modules())


def test_a_split_into_packs_changes_nothing_for_longrope(tmp_path, tokenizer):
    rows = [
        {"prompt": "q:", "chosen": " good", "rejected": " bad"},
        {"prompt": "long " * 12, "chosen": " good", "rejected": " bad"},
    ]
    config = {"max_steps": 1, "batch_size": 2, "learning_rate": 1e-3, "progress": False, "tensorboard": False}
    a, b = (
        train(
            "dpo",
            TrainConfig(output=str(tmp_path / str(budget)), tokens_per_batch=budget, **config),
            model=phi3(),
            tokenizer=tokenizer,
            examples=rows,
        )
        for budget in (4096, 110)
    )
    for name in ("loss", "logps/chosen", "grad_norm"):
        assert a.history[0][name] == pytest.approx(b.history[0][name], rel=1e-4)


def test_samples_that_could_not_be_scored_as_they_are_drawn(tmp_path, tokenizer):
    settings = {
        "output": str(tmp_path / "out"),
        "batch_size": 2,
        "max_steps": 1,
        "progress": False,
        "tensorboard": False,
    }
    data = {
        "tokenizer": tokenizer,
        "prompts": [{"prompt": "abc"}, {"prompt": "d"}],
        "reward": lambda completions: [0.0, 1.0] * (len(completions) // 2),
    }
    with pytest.raises(
        UserError, match="beyond 32 this model's rotary frequencies depend on the longest sequence"
    ):
        train_online(
            "grpo", OnlineConfig(**settings, max_new_tokens=40, samples_per_prompt=2), model=phi3(), **data
        )
    train_online(
        "grpo", OnlineConfig(**settings, max_new_tokens=8, samples_per_prompt=2), model=phi3(), **data
    )


HEADS = {
    "gemma2": lambda: build(
        "Gemma2", head_dim=8, sliding_window=16, final_logit_softcapping=3.0, attn_logit_softcapping=2.0
    ),
    "gemma3": lambda: build_gemma3(),
    "cohere": lambda: build("Cohere", logit_scale=0.0625),
    "granite": lambda: build(
        "Granite",
        logits_scaling=8.0,
        embedding_multiplier=12.0,
        residual_multiplier=0.2,
        attention_multiplier=0.01,
    ),
    "mistral with a window": lambda: build("Mistral", sliding_window=16),
    "llama3": lambda: build(
        "Llama",
        rope_parameters={"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **STATIC},
    ),
    "yarn": lambda: build("Llama", rope_parameters={"rope_type": "yarn", **STATIC}),
}


def build_gemma3():
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=16)
    ).eval()


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_what_the_head_and_the_layers_do_is_done(make):
    """Softcaps, scales of logits and embeddings, windows, static scaling: as transformers' own eager
    model."""

    def eager():
        model = make()
        model.set_attn_implementation("eager")
        return model

    assert largest_change(eager, "auto", (12, 80, 33)) < 1e-5


def roberta():
    torch.manual_seed(0)
    sizes = {
        name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "pad_token_id")
    }
    return transformers.RobertaForCausalLM(
        transformers.RobertaConfig(**sizes, pad_token_id=1, is_decoder=True)
    )


REFUSED = {
    "a convolution": lambda: build("Lfm2", layer_types=["conv", "full_attention"]),
    "a state": lambda: build(
        "Jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False,
        num_experts=4, num_experts_per_tok=2,
    ),
    "positions that begin elsewhere": roberta,
    "no positions (ALiBi)": lambda: transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)),
}  # fmt: skip


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_no_attention_keeps_apart_is_refused(make):
    with pytest.raises(UserError, match="cannot train on packed sequences: packed: .*; sdpa: .*; eager: "):
        PackedCausalLM(make())


class LooksFar(transformers.LlamaForCausalLM):
    """Scales its logits by the length of the whole input, once that exceeds 40 tokens: no short sequence
    shows it."""

    def forward(self, input_ids=None, position_ids=None, **options):
        output = super().forward(input_ids=input_ids, position_ids=position_ids, **options)
        if input_ids.shape[1] > 40:
            output.logits = output.logits * 0.5
        return output


def test_the_probe_looks_at_the_lengths_of_the_run(tmp_path, tokenizer):
    def make():
        return LooksFar(make_model().config)

    PackedCausalLM(make())
    with pytest.raises(
        UserError,
        match="in a pack of 98 tokens a sequence .the longest has 30. differs from the same sequence alone",
    ):
        PackedCausalLM(make(), lengths=Lengths(30, 100))
    settings = {"output": str(tmp_path / "out"), "max_steps": 1, "progress": False, "tensorboard": False}
    with pytest.raises(UserError, match="differs from the same sequence alone"):
        train("dpo", TrainConfig(**settings), model=make(), tokenizer=tokenizer, examples=make_rows())
    with pytest.raises(UserError, match="differs from the same sequence alone"):
        data = {"prompts": [{"prompt": "abc"}] * 4, "reward": lambda completions: [0.0] * len(completions)}
        train_online(
            "grpo", OnlineConfig(**settings, max_new_tokens=20), model=make(), tokenizer=tokenizer, **data
        )
    assert not (tmp_path / "out").exists()


# --- the router ---------------------------------------------------------------------------------------------


def some_pairs(count=4):
    generator = torch.Generator().manual_seed(2)
    return [
        token_pair(
            *(torch.randint(2, 300, (n,), generator=generator, dtype=torch.int32) for n in (5 + i, 4, 3 + i))
        )
        for i in range(count)
    ]


def gradients(model, loss, budget):
    config = TrainConfig(loss=loss, tokens_per_batch=budget)
    method, lm, data = make_method("dpo", config), PackedCausalLM(model), some_pairs()
    zeros = lambda batch, packed: torch.zeros(packed.labels.shape)  # noqa: E731
    sums, _ = accumulate(lm, method, Split(data, zeros), range(len(data)), backward=True)
    return sums.means(), [p.grad.clone() for p in model.parameters()], lm, data


@pytest.mark.parametrize("loss", ["dpo", "alpha_dpo"])
@pytest.mark.parametrize("budget", [4096, 40])
def test_the_routers_loss_is_that_of_transformers(loss, budget):
    """Loss and gradient are those without it, plus coefficient x the loss that transformers reports for each
    pack, weighted by its tokens; in one pack and in several, where all pairs of a step are seen at once
    (alpha_dpo) too."""
    plain, before, _, _ = gradients(mixtral(0.0), loss, budget)
    model = mixtral(0.7)
    found, after, lm, data = gradients(model, loss, budget)
    batches = pack_examples(data, range(len(data)), budget)
    assert (len(batches) > 1) == (budget == 40)
    total = sum(len(batch.packed.input_ids) for batch in batches)
    model.zero_grad()
    own = 0.0
    for batch in batches:
        aux = lm.forward(model, batch.packed).aux_loss
        (0.7 * aux * len(batch.packed.input_ids) / total).backward()
        own += float(aux.detach()) * len(batch.packed.input_ids) / total
    assert found["aux_loss"] == pytest.approx(own, rel=1e-6) and found["loss"] == pytest.approx(
        plain["loss"] + 0.7 * own, rel=1e-6
    )
    assert (
        "aux_loss" not in plain
        and max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) > 1e-3
    )
    for old, new, p in zip(before, after, model.parameters()):
        torch.testing.assert_close(new, old + (p.grad if p.grad is not None else 0.0), rtol=1e-4, atol=1e-6)


METHODS = [
    ("dpo", make_rows),
    ("tdpo", make_rows),
    ("kto", make_responses),
    ("bco", make_responses),
    ("listwise", make_lists),
]


@pytest.mark.parametrize("method, rows", METHODS, ids=[method for method, _ in METHODS])
def test_every_method_has_it(tmp_path, tokenizer, capsys, method, rows):
    settings = {
        "max_steps": 1,
        "batch_size": 4,
        "progress": False,
        "tensorboard": False,
        "tokens_per_batch": 128,
        "eval_fraction": 0.3,
    }
    norms = []
    for name, model in (("off", mixtral(5.0, asked=False)), ("on", mixtral(5.0))):
        config = TrainConfig(output=str(tmp_path / name), **settings)
        record = train(method, config, model=model, tokenizer=tokenizer, examples=rows()).history
        norms.append(next(each["grad_norm"] for each in record if "loss" in each))
        assert all(("aux_loss" in each or "eval_aux_loss" in each) == (name == "on") for each in record)
    assert norms[0] != norms[1]
    said = capsys.readouterr().out
    assert "router: its load-balancing loss is left out, as the model's configuration says" in said
    assert "router: its load-balancing loss is added, times 5" in said


@pytest.mark.parametrize("method", ["ppo", "grpo", "online_dpo"])
def test_online_methods_have_it(tmp_path, tokenizer, method):
    norms = []
    for name, asked in (("off", False), ("on", True)):
        config = OnlineConfig(
            output=str(tmp_path / name), max_steps=1, batch_size=4, max_new_tokens=6,
            minibatches=None if method == "online_dpo" else 2, progress=False, tensorboard=False,
            tokens_per_batch=64,
        )  # fmt: skip
        data = {
            "prompts": [{"prompt": c} for c in "abcd"],
            "reward": lambda completions: [float(len(set(text))) for text in completions],
        }
        record = train_online(method, config, model=mixtral(5.0, asked), tokenizer=tokenizer, **data).history[
            0
        ]
        norms.append(record["grad_norm"])
        assert ("aux_loss" in record) == asked
    assert norms[0] != norms[1]


def test_a_reward_model_says_that_it_has_none(tmp_path, tokenizer, capsys):
    model = mixtral(5.0)
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    settings = {"output": str(tmp_path / "out"), "max_steps": 1, "progress": False, "tensorboard": False}
    train(
        "reward",
        TrainConfig(**settings),
        model=transformers.MixtralForSequenceClassification(config),
        tokenizer=tokenizer,
        examples=make_rows(),
    )
    assert (
        "router: its load-balancing loss is left out: MixtralForSequenceClassification does not compute it"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("coefficient", [-1.0, float("nan"), float("inf")])
def test_a_coefficient_out_of_range(coefficient):
    model = mixtral()
    model.router_aux_loss_coef = coefficient
    with pytest.raises(UserError, match="router_aux_loss_coef .*must be a finite number, not negative"):
        PackedCausalLM(model)
