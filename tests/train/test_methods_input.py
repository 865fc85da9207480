"""What a method refuses before anything is trained: losses, columns and settings that do not go together."""

import re

import pytest
from tiny import ROWS, make_rows, write_jsonl

from fastalign.train import UserError, train

REFUSED = [
    ("dpo", {"loss": "odpo"}, "pairs", "training example 0: field 'margin': missing"),
    ("dpo", {"loss": "dno,sft"}, "pairs", "one number per pair .*use it alone"),
    ("dpo", {"loss": "dpo,dpo"}, "pairs", "'dpo' is named twice"),
    ("dpo", {"loss": "dpo=much,sft"}, "pairs", "weight of 'dpo' must be a number"),
    ("dpo", {"loss": "dpo=nan,sft"}, "pairs", "weight of 'dpo' must be positive, got nan"),
    ("dpo", {"loss": "dpo=inf,sft"}, "pairs", "weight of 'dpo' must be positive, got inf"),
    ("dpo", {"loss": "sigmoid=-1"}, "pairs", "weight of 'sigmoid' must be positive, got -1"),
    ("dpo", {"loss": "dpo,sft=0"}, "pairs", "weight of 'sft' must be positive, got 0"),
    (
        "dpo",
        {"loss_options": {"reference": "yes"}},
        "pairs",
        "--set reference must be true or false, got 'yes'",
    ),
    (
        "dpo",
        {"loss": "dpo,sft", "loss_options": {"dpo.reference": 1}},
        "pairs",
        "--set reference must be true or false, got 1",
    ),
    ("dpo", {"loss": "odpo=0.5"}, "pairs", "one number per pair"),
    ("dpo", {"loss": "dpo,ld_dpo"}, "pairs", "must agree in ld_alpha"),
    ("dpo", {"loss_options": {"gamma_ext": 1.0}}, "pairs", "give the data a column 'margin'"),
    (
        "dpo",
        {"loss": "dpo,sft", "loss_options": {"beta": 0.1}},
        "pairs",
        "in a mixture an option belongs to one of its losses",
    ),
    ("dpo", {"loss": "dpo,sft", "loss_options": {"simpo.beta": 0.1}}, "pairs", "has no part 'simpo'"),
    (
        "dpo",
        {"loss": "ipo", "loss_options": {"beta": 0.1}},
        "pairs",
        "loss 'ipo' does not take 'beta': .* write tau=0.1",
    ),
    ("dpo", {"loss": "ipo=0.5,sft", "loss_options": {"ipo.beta": 0.1}}, "pairs", "write tau=0.1"),
    ("dpo", {"loss_options": {"f_divergence_type": "js_divergence"}}, "pairs", "js_divergence f_dpo_js"),
    ("reward", {"loss_options": {"center_rewards_coefficient": 0.01}}, "pairs", "write centering=0.01"),
    ("dpo", {"loss": "beta_dpo", "loss_options": {"filter": 2}}, "pairs", "filter"),
    ("dpo", {"loss": "beta_dpo", "loss_options": {"nonsense": 2}}, "pairs", "no option 'nonsense'"),
    ("dpo", {"loss": "wpo", "loss_options": {"clamp": -1}}, "pairs", "clamp=-1"),
    ("tdpo", {"precompute_ref": True}, "pairs", "whole distribution"),
    ("tdpo", {"loss": "dpo"}, "pairs", "'fastalign train dpo'"),
    ("kto", {"loss": "dpo"}, "responses", "legal: kto, apo_zero_unpaired"),
    ("kto", {"loss_options": {"tau": 1}}, "responses", "no option 'tau'; legal: beta"),
    ("kto", {"batch_size": 1}, "responses", "a step needs two"),
    ("kto", {"precompute_ref": True}, "responses", "a cache does not hold them"),
    ("kto", {}, "pairs", "field 'completion': missing"),
    ("bco", {"loss_options": {"momentum": 1.5}}, "responses", "momentum"),
    ("bco", {"loss_options": {"omega": 1.5}}, "responses", "'weight' column"),
    ("dro", {"loss_options": {"tau": 0}}, "responses", "tau"),
    (
        "dro",
        {"loss_options": {"standardise": 3}},
        "responses",
        "--set standardise must be true or false, got 3",
    ),
    (
        "dro",
        {"loss_options": {"rescale": "no"}},
        "responses",
        "--set rescale must be true or false, got 'no'",
    ),
    (
        "listwise",
        {"loss": "lipo", "loss_options": {"reference": "yes"}},
        "lists",
        "--set reference must be true or false, got 'yes'",
    ),
    ("listwise", {"loss": "dpo"}, "lists", "legal for lists: plackett_luce"),
    ("listwise", {"loss": "rrhf", "precompute_ref": True}, "lists", "uses no reference"),
    ("reward", {"loss": "dpo"}, "pairs", "legal: bt_rm, kwise_rm"),
    ("reward", {"loss_options": {"beta": 1}}, "pairs", "no option 'beta'; legal: centering"),
    ("reward", {"loss_options": {"centering": -1}}, "pairs", "centering"),
    (
        "reward",
        {"precompute_ref": True},
        "pairs",
        "has no setting --precompute-ref; beside the common ones it has: --loss, --set",
    ),
    ("reward", {"loss": "kwise_rm"}, "pairs", "field 'completions': missing"),
    ("nonsense", {}, "pairs", "unknown method 'nonsense'; legal: sft, dpo"),
]


@pytest.mark.parametrize(
    "method, settings, rows, words",
    REFUSED,
    ids=[f"{m} {re.sub('[^a-z_]+', ' ', str(s))}" for m, s, _, _ in REFUSED],
)
def test_refused_before_training(config, method, settings, rows, words):
    settings = config(data=None, **settings)
    with pytest.raises(UserError, match=words):
        train(method, settings, examples=ROWS[rows])
    assert not settings.output_dir().exists()


def test_columns_must_be_those_of_the_first_line(config, tmp_path):
    rows = [{**row, "margin": 1.0} for row in make_rows(3)]
    del rows[2]["margin"]
    path = write_jsonl(tmp_path / "odd.jsonl", rows)
    with pytest.raises(
        UserError, match="odd.jsonl, line 3: field 'margin': missing here, unlike in the first line"
    ):
        train("dpo", config(data=str(path)))
    write_jsonl(path, [rows[2], rows[0]])
    with pytest.raises(UserError, match="line 2: field 'margin': given here"):
        train("dpo", config(data=str(path)))


def test_evaluation_data_with_other_columns(config, tmp_path):
    with_margin = write_jsonl(tmp_path / "a.jsonl", [{**row, "margin": 1.0} for row in make_rows(3)])
    with pytest.raises(UserError, match="evaluation data lacks the column 'margin'"):
        train("dpo", config(data=str(with_margin), eval_data=config().data))
