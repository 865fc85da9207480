"""Packed sequences do not see each other, packs respect the budget, the step order is a function of the
step."""

import inspect

import pytest
import torch
import transformers
from tiny import make_model

import fastalign
from fastalign.train import PackedCausalLM, UserError, token_pair
from fastalign.train.data.examples import Schedule, fingerprint, pack_examples
from fastalign.train.models.attention import packed_attention

ATTENTION = ("packed", "sdpa", "eager")
LENGTHS = (7, 12, 1, 9)


def sequences(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(300, (n,), generator=generator) for n in LENGTHS]


def rows_of(logits, i):
    start = sum(LENGTHS[:i])
    return logits[start : start + LENGTHS[i]]


def mistral(**options):
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            sliding_window=4,
            **options,
        )
    )


@pytest.mark.parametrize("attention", ATTENTION)
@torch.no_grad()
def test_mutating_the_neighbours_changes_nothing(attention):
    """And the negative control: with positions that run through the whole pack, the same comparison sees the
    neighbours."""
    lm = PackedCausalLM(make_model(), attention=attention)
    assert lm.attention == attention and lm.model.config._attn_implementation.endswith(attention)
    mine, others = sequences(0), sequences(1)
    others[1] = mine[1]
    batch, mutated = fastalign.pack(mine), fastalign.pack(others)
    assert torch.equal(rows_of(lm.logits(batch), 1), rows_of(lm.logits(mutated), 1))
    assert not torch.equal(rows_of(lm.logits(batch), 3), rows_of(lm.logits(mutated), 3))

    def leaking(batch):
        one = torch.tensor([0, len(batch.input_ids)], dtype=torch.int32)
        return batch._replace(position_ids=torch.arange(len(batch.input_ids)), cu_seqlens=one)

    difference = rows_of(lm.logits(leaking(batch)), 1) - rows_of(lm.logits(leaking(mutated)), 1)
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("make", [make_model, mistral], ids=["causal", "sliding window"])
@torch.no_grad()
def test_packed_equals_one_at_a_time(attention, make):
    lm, alone = PackedCausalLM(make(), attention=attention), make().eval()
    alone.set_attn_implementation("eager")
    logits = lm.logits(fastalign.pack(sequences()))
    for i, sequence in enumerate(sequences()):
        torch.testing.assert_close(rows_of(logits, i), alone(sequence[None]).logits[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", ATTENTION)
def test_gradients_of_one_sequence_stop_at_its_boundary(attention):
    lm = PackedCausalLM(make_model(), attention=attention)
    tokens = sequences()
    rows_of(lm.logits(fastalign.pack(tokens)), 1).square().sum().backward()
    touched = lm.model.get_input_embeddings().weight.grad.abs().sum(1) > 0
    assert set(touched.nonzero().flatten().tolist()) == set(tokens[1].tolist())


def test_a_model_that_lets_sequences_see_each_other_is_refused():
    """OPT builds its masks without position_ids: with sdpa and eager its packed sequences are not
    separate."""
    torch.manual_seed(0)
    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=100,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        )
    )
    with pytest.raises(UserError, match="sdpa: a packed sequence sees its neighbours"):
        PackedCausalLM(opt, attention="sdpa")


def test_a_model_without_position_ids_is_refused_with_every_reason():
    torch.manual_seed(0)
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=100, hidden_size=32, n_layer=1, n_head=4)
    )
    with pytest.raises(UserError, match="packed: the model takes no position_ids; sdpa: .*; eager: "):
        PackedCausalLM(bloom)


def test_auto_passes_over_with_a_reason():
    torch.manual_seed(0)
    gemma = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    )
    lm = PackedCausalLM(gemma)
    assert lm.attention == "eager" and "softcap" in lm.refused["packed"] and "softcap" in lm.refused["sdpa"]


def test_the_model_gets_its_attention_back():
    model = make_model()
    before = model.config._attn_implementation
    PackedCausalLM(model, attention="packed").restore()
    assert model.config._attn_implementation == before
    model(torch.arange(5)[None])


def test_packed_attention_refuses_what_it_cannot_honour():
    q = torch.randn(1, 2, 5, 4)
    module = torch.nn.Module()
    for options, words in (
        ({}, "packed_lengths"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": q}, "s_aux"),
        ({"is_causal": False}, "is_causal"),
    ):
        with pytest.raises(ValueError, match=words):
            packed_attention(module, q, q, q, None, **options)
    with pytest.raises(ValueError, match="attention_mask"):
        packed_attention(module, q, q, q, torch.ones(5, 5), packed_lengths=(5,))


def test_flash_attention_gets_the_boundaries():
    """What transformers' FlashAttention path reads, by its names there."""
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    lm = PackedCausalLM(make_model())
    lm.attention, seen = "flash_attention_2", {}

    def model(**options):
        seen.update(options)
        return transformers.modeling_outputs.CausalLMOutput(logits=torch.zeros(1, len(batch.input_ids), 3))

    lm.model, batch = model, fastalign.pack(sequences())
    assert lm.logits(batch).shape == (sum(LENGTHS), 3)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        assert name in inspect.signature(_flash_attention_forward).parameters and name in seen
    assert seen["cu_seq_lens_q"].tolist() == [0, 7, 19, 20, 29] and seen["max_length_q"] == 12
    assert seen["attention_mask"] is None and seen["use_cache"] is False


def pairs(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        token_pair(
            *(
                torch.randint(300, (int(n),), dtype=torch.int32)
                for n in torch.randint(1, 20, (3,), generator=generator)
            )
        )
        for _ in range(count)
    ]


def test_packs_hold_every_pair_once_within_the_budget_and_nothing_but_its_tokens():
    data = pairs(40)
    indices = list(range(5, 35))
    batches = pack_examples(data, indices, budget=150)
    assert sorted(i for batch in batches for i in batch.members) == indices
    for batch in batches:
        expected = [
            torch.cat([data[i].prompt, side])
            for i in batch.members
            for side in (data[i].chosen, data[i].rejected)
        ]
        assert (
            batch.packed.input_ids.tolist() == torch.cat(expected).tolist()
            and len(batch.packed.input_ids) <= 150
        )  # no padding
        assert batch.packed.mask.sum() == sum(
            len(data[i].chosen) + len(data[i].rejected) for i in batch.members
        )
        assert batch.packed.cu_seqlens.diff().tolist() == list(map(len, expected))
    tokens = sum(data[i].tokens() for i in indices)
    assert len(batches) <= 1.5 * tokens / 150 + 1


def test_every_epoch_visits_every_pair_once(config):
    schedule = Schedule(10, config(batch_size=4, epochs=3, max_steps=None))
    assert (schedule.steps_per_epoch, schedule.steps) == (3, 9)
    epochs = [[i for step in range(3 * e, 3 * e + 3) for i in schedule.indices(step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert Schedule(10, config(batch_size=4)).indices(2) == epochs[0][8:]


def test_the_fingerprint_sees_tokens_and_boundaries():
    data = pairs(3)
    first = data[0]
    moved = token_pair(torch.cat([first.prompt, first.chosen[:1]]), first.chosen[1:], first.rejected)
    variants = [
        data,
        data[::-1],
        [moved, *data[1:]],
        data[:2],
        [token_pair(first.prompt, first.chosen, first.rejected + 1), *data[1:]],
        [token_pair(first.prompt, first.chosen, first.rejected, weight=0.5), *data[1:]],
    ]
    assert len({fingerprint(variant) for variant in variants}) == len(variants)
