"""What CONTRIBUTING.md says of a preset, a link and a row statistic, done on a copy of the package: the right
numbers come out of it, and no more files are touched than it says."""

from __future__ import annotations

import torch
from project.copies import Copy

# A loss and its gradient by the preset `{preset}`, on each of the backends, against `{truth}` in fp64: a
# function of beta times the difference of the pair's summed log-ratios.
CHECK = """
import fastalign as fa, torch
from fastalign.losses.pair import Preset
from fastalign.testing import assert_close, make_batch
batch = make_batch(4)
cu, mask = batch.packed.cu_seqlens, batch.packed.mask
leaf = batch.logprobs.double().requires_grad_()
d = torch.where(mask, leaf - batch.ref_logprobs.double(), 0.0)
u = 0.5 * torch.stack([d[a:b].sum() for a, b in zip(cu.tolist(), cu.tolist()[1:])])
h = u[::2] - u[1::2]
want = ({truth}).mean()
(slope,) = torch.autograd.grad(want, leaf)
for backend in {backends}:
    with fa.use_backend(backend):
        lp = batch.logprobs.clone().requires_grad_()
        loss = fa.preference_loss(lp, batch.ref_logprobs, cu, mask=mask, loss={preset}).loss
        assert_close(loss, want, scale=10.0, what=backend)
        assert_close(torch.autograd.grad(loss, lp)[0], slope, scale=10.0, what=backend)
print(fa.losses.available().markdown())
"""


def test_a_preset_is_a_row_of_one_file(tmp_path):
    copy = Copy(tmp_path)
    row = 'Preset("made_up", "relu(2 - h)^2", "nobody", beta=0.5, link="truncquad", target=2.0),\n        '
    copy.before("fastalign/losses/tables.py", "# --- other margins\n", row)
    backends = ("reference", "cpu", "triton")
    code = CHECK.format(truth="torch.relu(2 - h) ** 2", preset='"made_up"', backends=backends)
    assert "| made_up |" in copy.run(code, TRITON_INTERPRET="1")
    assert len(copy.files) == 1


# --- a link -------------------------------------------------------------------------------------------------

# With a parameter of its own: value and slope in C++, and in Python and Triton; the truth in PyTorch.
LINK = {
    "value": ("log1p(h * h / tau)", "T(2) * h / (tau + h * h)"),
    "torch": ("torch.log1p(h * h / tau)", "2 * h / (tau + h * h)"),
    "triton": ("log1p(div(h * h, tau))", "div(2.0 * h, tau + h * h)"),
    "truth": "torch.log1p(h * h / 2.5)",
    "options": ", link_tau=2.5",
}
OWN_NUMBERS = """
from fastalign.ops.columns import CAUCHY
print(CAUCHY)
try:
    Preset(link="cauchy", link_tau=10.5)
except ValueError as error:
    print(str(error).partition(":")[0].partition(";")[0])
"""
PROBE = """
#include <cstdio>
#include "names.h"
int main() {{
  for (auto [name, value] : fastalign::kNumbers) if (std::string(name) == "kCauchy") std::printf("%d\\n", value);
  for (double h : {{{points}}}) {{
    auto f = fastalign::link<double>(fastalign::kCauchy, h, 0.0, 2.5, 0.5);
    std::printf("%.17g %.17g\\n", f.value, f.slope);
  }}
}}
"""


def add_link(copy, made):
    pair, reference, triton = (
        "csrc/math/pair.h",
        "fastalign/ops/preference/reference.py",
        "fastalign/ops/math/pair.py",
    )
    columns = "fastalign/ops/columns.py"
    copy.after(pair, "X(kDiscopop)", " X(kCauchy)")
    copy.before(pair, "    case kDiscopop:", "    case kCauchy: return {{{}, {}}};\n".format(*made["value"]))
    copy.after(columns, '"exo", "discopop"', ', "cauchy"')
    copy.replace(columns, "EXO, DISCOPOP = range", "EXO, DISCOPOP, CAUCHY = range")
    copy.after(columns, "TAU_LINKS = {", '"cauchy": 10.0, ')
    copy.before(reference, "    DISCOPOP,\n", "    CAUCHY,\n")
    copy.before(
        reference,
        "    if kind == DISCOPOP:",
        "    if kind == CAUCHY:\n        return {}, {}\n".format(*made["torch"]),
    )
    copy.before(triton, "    DISCOPOP,\n", "    CAUCHY,\n")
    branch = "    elif KIND == CAUCHY:\n        value, slope = {}, {}\n".format(*made["triton"])
    copy.before(triton, "    elif KIND == DISCOPOP:", branch)


def test_a_link_is_a_name_and_three_formulas(tmp_path):
    copy, made = Copy(tmp_path), LINK
    add_link(copy, made)
    preset = f'Preset(link="cauchy", beta=0.5{made["options"]})'
    code = CHECK.format(truth=made["truth"], preset=preset, backends=("reference", "triton"))
    own = copy.run(code + OWN_NUMBERS, TRITON_INTERPRET="1").splitlines()[-2:]
    points = torch.tensor([-3.0, -0.5, 0.0, 1.25], dtype=torch.float64, requires_grad=True)
    want = eval(made["truth"], {"torch": torch, "h": points})
    (slope,) = torch.autograd.grad(want.sum(), points)
    number, *lines = copy.run_cpp(PROBE.format(points=", ".join(map(str, points.tolist())))).splitlines()
    assert own == [number, "link_tau=10.5 is out of range"]
    got = torch.tensor([[float(x) for x in line.split()] for line in lines], dtype=torch.float64)
    torch.testing.assert_close(got, torch.stack([want.detach(), slope], -1), rtol=1e-12, atol=1e-12)
    assert len(copy.files) == 4 and copy.edits == 9


# --- a row statistic ----------------------------------------------------------------------------------------

# From sums that every state has, of rows on the reference and in interpreted Triton; a masked row gives 0.
CHECK_STATISTIC = """
import fastalign as fa, torch
from fastalign.testing import assert_close, make_labels, make_logits
logits, labels = make_logits(5, 300), make_labels(5, 300)
mask = torch.tensor([True, True, False, True, True])
want = torch.where(mask, torch.log_softmax(logits.double(), -1).amax(-1), 0.0)
for backend in ("reference", "triton"):
    with fa.use_backend(backend):
        for outputs in (("max_logprob",), ("logprob", "entropy", "max_logprob", "is_top1", "kl_policy_ref")):
            stats = fa.token_stats(logits, labels, ref_logits=logits, outputs=outputs, mask=mask)
            assert_close(stats.max_logprob, want, scale=16.0, what=backend)
    assert not stats.max_logprob.requires_grad
    assert "kl_policy_ref" not in outputs or bool((stats.kl_policy_ref == 0).all())
from fastalign.ops.columns import OUT_MAX_LOGPROB
print(OUT_MAX_LOGPROB)
"""
STATISTIC_PROBE = """
#include <cstdio>
#include <string>
#include "names.h"
#include "row_results.h"
int main() {
  using namespace fastalign;
  for (auto [name, value] : kNumbers) if (std::string(name) == "kOutMaxLogprob") std::printf("%d\\n", value);
  RowState<double> s = RowState<double>::empty();  // of the logits 1, 3, 3 in bits
  s.m = s.umax = 3.0, s.s0 = 2.25;
  double out = 7.0;
  TokenStatsArgs a{};
  a.max_logprob = &out;
  RowTransform<double> f{1.0, 0.0};
  write_statistics<double>(a, 0, s, f, [](double x) { return std::exp2(x); });
  std::printf("%.17g\\n", out);
  write_no_statistics<double>(a, 0);
  std::printf("%.17g\\n", out);
}
"""


def add_statistic(copy):
    """max_logprob, the log of the largest probability; after is_top1, for the outputs with a reference come
    last."""
    state, results = "csrc/math/row_state.h", "csrc/row_results.h"
    copy.after(state, "X(kOutIsTop1, is_top1)", " X(kOutMaxLogprob, max_logprob)")
    formula = "{ return s.umax * (f.c * T(kLn2)) - row_logsumexp(s, f); }\n"
    place = "template <class T> FA_HD T row_mean_logit("
    copy.before(
        state,
        place,
        f"{place.replace('mean_logit', 'max_logprob')}const RowState<T>& s, const RowTransform<T>& f) "
        f"{formula}",
    )
    place = "  if (a.is_top1) put("
    copy.before(results, place, "  if (a.max_logprob) put(a.max_logprob, row, row_max_logprob(s, f));\n")
    copy.after(results, "a.mean_logit, a.is_top1,", " a.max_logprob,")
    columns = "fastalign/ops/columns.py"
    copy.after(columns, '"is_top1",', ' "max_logprob",')
    copy.after(columns, "OUT_IS_TOP1,", " OUT_MAX_LOGPROB,")
    reference = "fastalign/ops/token_stats/reference.py"
    copy.before(
        reference, '        "is_top1": lambda', '        "max_logprob": lambda: LN2 * shift - log_s0,\n'
    )
    triton = "fastalign/ops/token_stats/triton_rows.py"
    copy.after(triton, "    OUT_LOGSUMEXP,\n", "    OUT_MAX_LOGPROB,\n")
    copy.after(triton, "    is_top1: tl.tensor\n", "    max_logprob: tl.tensor\n")
    branch = """    if OUT_MAX_LOGPROB & OUTPUTS:
        largest = s.umax * (c * LN2) - row_logsumexp(s.m, s.s0, s.umax, c)
        tl.store(out.max_logprob + row, tl.where(scored != 0, largest, 0.0))
"""
    copy.before(triton, "    if OUT_IS_TOP1 & OUTPUTS:", branch)
    copy.after(
        "fastalign/rows/stats.py",
        "    is_top1: Tensor | None = None\n",
        "    max_logprob: Tensor | None = None\n",
    )


def test_a_row_statistic_touches_six_files(tmp_path):
    copy = Copy(tmp_path)
    add_statistic(copy)
    bit = copy.run(CHECK_STATISTIC, TRITON_INTERPRET="1").strip()
    number, value, masked = copy.run_cpp(STATISTIC_PROBE).split()
    assert number == bit and float(masked) == 0.0
    probabilities = torch.softmax(
        torch.tensor([1.0, 3.0, 3.0], dtype=torch.float64) * torch.log(torch.tensor(2.0).double()), 0
    )
    assert abs(float(value) - float(probabilities.max().log())) < 1e-12
    copy.compiles("csrc/bindings.cpp", "csrc/cpu/token_stats.cpp")
    assert len(copy.files) == 6
