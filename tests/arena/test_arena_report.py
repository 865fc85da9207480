"""The arena's report from numbers made by hand: means, errors, verdicts, table, page; labels that do not
overlap."""

from __future__ import annotations

import dataclasses
import html
import random

import pytest

from fastalign.arena import picture, report
from fastalign.arena.entries import ENTRIES
from fastalign.arena.settings import ArenaConfig


def cell(name, seed, beta, gain, kl=1.0, se=0.01):
    return {
        "entry": name, "seed": seed, "beta": beta, "gold_reward": 0.5 + gain, "gold_reward_se": 0.02,
        "gain": gain, "gain_se": se,
        "kl_k1": kl, "kl_k1_se": 0.3, "kl_k3": kl, "kl_k3_se": 0.1, "length": 40.0, "length_se": 1.0,
        "win_rate": 0.7,
        "win_rate_se": 0.03, "finished": 1.0, "labels": 10, "examples": 5, "seconds": 2.0,
        "core_seconds": 1.5, "definition": [],
    }  # fmt: skip


def test_errors_are_over_seeds_and_of_one_seed_over_its_samples():
    one = report.summarise([cell("dpo", 0, 0.1, 0.3)])
    assert (one["gain"], one["gain_se"], one["kl_k3_se"], one["seeds"]) == (0.3, 0.01, 0.1, [0])
    three = report.summarise([cell("dpo", seed, 0.1, gain) for seed, gain in enumerate((0.1, 0.2, 0.3))])
    assert three["gain"] == pytest.approx(0.2) and three["gain_se"] == pytest.approx(0.1 / 3**0.5)
    assert three["win_rate_se"] == 0.0 and three["seeds"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("gain", "error", "kl", "said"),
    [
        (0.3, 0.1, 1.0, "raises it"), (0.2, 0.1, 1.0, "does not"), (-0.3, 0.1, 1.0, "does not"),
        (0.0, 0.0, 0.0, "does not"),
        (0.3, 0.1, 15.0, "raises it"), (0.3, 0.1, 15.1, "KL beyond the bound"),
        (float("nan"), 0.1, 1.0, "does not"),
        (0.3, 0.1, float("nan"), "KL beyond the bound"),
    ],
)  # fmt: skip
def test_verdict(gain, error, kl, said):
    assert report.verdict({"gain": gain, "gain_se": error, "kl_k3": kl}, 15.0) == said


def made():
    entries = [
        ENTRIES["dpo"],
        dataclasses.replace(ENTRIES["ipo"], expected="its target is far"),
        ENTRIES["rrhf"],
    ]
    cells = [cell("dpo", seed, beta, beta - 0.4 + seed / 100) for seed in (0, 1) for beta in (0.2, 0.5, 1.0)]
    cells += [cell("ipo", seed, 5.0, 0.001 * (-1) ** seed) for seed in (0, 1)]
    broken = {"rrhf-seed0": "not finite"}
    return entries, cells, broken, report.rows(entries, cells, broken, 15.0)


def test_rows_hold_the_coefficient_of_the_entry_and_the_frontier():
    *_, rows = made()
    assert [row["name"] for row in rows] == [
        "dpo",
        "ipo",
        "rrhf",
    ]  # the largest gain first, then what has none
    dpo, ipo, rrhf = rows
    assert dpo["beta"] == 0.5 and dpo["gain"] == pytest.approx(0.105)
    assert [point["beta"] for point in dpo["frontier"]] == [0.2, 0.5, 1.0]
    assert (dpo["verdict"], dpo["expected"]) == ("raises it", "")
    assert (ipo["verdict"], ipo["expected"]) == ("does not", "its target is far")
    assert rrhf["verdict"] == "broke off" and "gain" not in rrhf


def test_the_table_says_what_does_not_rise_and_why():
    *_, rows = made()
    lines = report.as_table(rows, {"gold_reward": 0.5, "length": 41.0}).splitlines()
    cells = [[each.strip() for each in line.strip("|").split("|")] for line in lines]
    assert cells[2][0] == "SFT" and cells[2][3] == "0.500"
    assert cells[3][:5] == ["DPO", "one logit, other links", "beta 0.5", "0.605", "+0.105 ± 0.005"]
    assert cells[3][-1] == "raises it"
    assert cells[4][2] == "tau 5" and cells[4][-1] == "does not: its target is far"
    assert cells[5][0] == "RRHF" and cells[5][-1] == "broke off: not finite"


def test_the_report_is_whole(tmp_path, capsys):
    entries, cells, broken, _ = made()
    sft = {seed: {"gold_reward": 0.5, "length": 41.0, "rewards": [0.5]} for seed in (0, 1)}
    results = report.write(ArenaConfig(seeds=2, full=True), tmp_path, entries, cells, sft, broken)
    assert {path.name for path in tmp_path.iterdir()} == {
        "arena.png", "frontier.png", "index.html", "results.json", "table.md",
    }  # fmt: skip
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "over 2 seeds" in page and "1,920 responses" in page
    assert "<tr class=no><td>IPO</td>" in page and "<tr><td>DPO</td>" in page
    assert len(results["cells"]) == 8 and "definition" not in results["cells"][0]
    assert "does not: its target is far" in capsys.readouterr().out


@pytest.mark.parametrize("name", ENTRIES)
def test_every_method_has_its_formula_and_paper_in_the_page(name):
    entry = ENTRIES[name]
    text = report.paragraph(entry)
    assert (
        html.escape(entry.shown) in text
        and "<code></code>" not in text
        and "arXiv" in text
        or "cdpo.pdf" in text
    )
    for stage in entry.stages:
        formula, paper, _ = report.source(stage)
        assert formula and paper
        assert f"fastalign train {stage.method}" in text


def test_formulas_come_from_the_row_of_the_loss():
    assert "softplus" not in report.source(ENTRIES["ipo"].stages[0])[0]
    assert report.source(ENTRIES["ipo"].stages[0])[:2] == (
        "(D_c / L_c - D_r / L_r - 1 / (2 tau))^2", "Azar et al. 2023, arXiv 2310.12036",
    )  # fmt: skip
    assert "arXiv 2309.06657" in report.source(ENTRIES["rso"].stages[0])[1]
    assert report.source(ENTRIES["nca"].stages[0])[0] == "sum p sp(-s) + sp(s) / K"
    assert report.source(ENTRIES["bco"].stages[0])[0].startswith("good: sp(")
    assert "V(x)" in report.source(ENTRIES["dro"].stages[0])[0]
    assert "arXiv 2503.14476" in report.source(ENTRIES["dapo"].stages[0])[1]
    assert "the data part by part" in report.source(ENTRIES["sdpo"].stages[0])[2]


# --- labels in the picture ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [20.0, 120.0, 400.0])
def test_labels_overlap_neither_each_other_nor_a_point(spread):
    draw = random.Random(3)
    points = [(600 + draw.gauss(0, spread), 400 + draw.gauss(0, spread / 2)) for _ in range(60)]
    points = [(min(max(x, 10), 1190), min(max(y, 10), 790)) for x, y in points]
    sizes = [(draw.uniform(30, 130), 15.0) for _ in points]
    boxes = picture.place(points, sizes, (0, 0, 1200, 800))
    assert all(
        box[2] - box[0] == pytest.approx(w) and box[3] - box[1] == pytest.approx(h)
        for box, (w, h) in zip(boxes, sizes)
    )
    for i, a in enumerate(boxes):
        assert a[0] >= 0 and a[2] <= 1200 and a[1] >= 0 and a[3] <= 800
        assert not any(picture.overlap(a, b) for b in boxes[:i])
        assert not any(a[0] < x < a[2] and a[1] < y < a[3] for x, y in points)


def test_a_label_steps_aside_for_an_error_bar_but_not_far():
    (free,) = picture.place([(100, 100)], [(40, 10)], (0, 0, 400, 400))
    (aside,) = picture.place([(100, 100)], [(40, 10)], (0, 0, 400, 400), bars=[free])
    assert aside != free and not picture.overlap(aside, free)
    (blocked,) = picture.place([(100, 100)], [(40, 10)], (0, 0, 400, 400), bars=[(0, 0, 400, 400)])
    assert blocked == free
