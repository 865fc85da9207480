"""What a new training method costs: one file and one row, offline and online alike. The change is made on a
copy of the package, and the copy trains by the command line."""

import json

from project.copies import Copy
from tiny import make_rows, write_jsonl

OFFLINE = '''
"""The likelihood of the better response alone."""

import fastalign
from fastalign.train.data.formats import PREFERENCE
from fastalign.train.methods.base import Method


class Likelihood(Method):
    name, format, default_loss, needs_reference = "likelihood", PREFERENCE, "nll", False

    def constants(self, lm, split, indices):
        return {"count": len(indices)}

    def loss(self, scored, *, training, count):
        packed = scored.packed
        totals = fastalign.sequence_sum(scored.policy["logprob"], packed.cu_seqlens, mask=packed.mask)[0::2]
        return -totals.sum() / count, {"logps/chosen": (totals.detach().sum(), totals.numel())}
'''

ONLINE = '''
"""RAFT: the likelihood of the best sample for each prompt."""

import fastalign
from fastalign.train.data.examples import pack_examples
from fastalign.train.methods.online import OnlineMethod
from fastalign.train.metrics import MetricSums


class RAFT(OnlineMethod):
    name, compares_samples = "raft", True

    def learn(self, step, rollouts, scores, optimizer):
        groups, sums = scores.view(-1, self.config.samples_per_prompt), MetricSums()
        best = groups.argmax(1) + self.config.samples_per_prompt * groups.new_tensor(range(len(groups))).long()
        examples, total = [rollouts[i].example for i in best.tolist()], 0.0
        for batch in pack_examples(examples, range(len(examples)), self.config.tokens_per_batch):
            packed = self.actor.lm.to_device(batch.packed)
            logprobs = fastalign.token_logprobs(self.actor.lm.logits(packed), packed.labels)
            loss = -fastalign.sequence_sum(logprobs, packed.cu_seqlens, mask=packed.mask).sum() / len(examples)
            loss.backward()
            total = total + loss.detach()
        sums.add({"loss": (total, 1), "grad_norm": (optimizer.clip(), 1), "best": (groups.amax(1).sum(), len(groups))})
        metrics = sums.means()
        return metrics | {"learning_rate": optimizer.update(step, metrics)}
'''

# A policy gradient of other advantages: the names of a class and of an estimator.
GRADIENT = '''
"""CISPO's loss on RLOO's advantages."""

from fastalign.train.methods.policy_gradient import PolicyGradient


class CispoLoo(PolicyGradient):
    name, estimator = "cispo_loo", "rloo"
'''

ROWS = {
    "likelihood": '''Row("the better response alone", "likelihood:Likelihood", TrainConfig, _LOSS,
        Page("Likelihood.", "-log pi", "none", _PAIR, _offline("likelihood", "pairs")))''',
    "raft": '''Row("the best of several samples", "raft:RAFT", OnlineConfig, (*_REWARD, *_SAMPLING),
        Page("RAFT.", "-log pi(y_best|x)", "arXiv 2304.06767", _PROMPT, _online("raft")), {"samples_per_prompt": 4})''',
    "cispo_loo": '''Row("CISPO with RLOO's advantages", "cispo_loo:CispoLoo", OnlineConfig, (*_GRADIENT, *_GROUPS),
        Page("CISPO with RLOO's advantages.", "-stop[rho] A lp", "none", _PROMPT, _online("cispo_loo")),
        _ONCE | {"loss": "cispo", "samples_per_prompt": 2, "kl_coef": 0.1, "kl_in": "reward", "kl_kind": "k1"})''',
}  # fmt: skip


METHODS = {
    "likelihood": (OFFLINE, "logps/chosen"), "raft": (ONLINE, "best"), "cispo_loo": (GRADIENT, "frac_kept"),
}  # fmt: skip
# Every command line in one process; their exit codes go to a file.
COMMANDS = """
import json, pathlib
from fastalign.cli.main import main
codes = []
for words in {commands}:
    try:
        codes.append(main(words))
    except SystemExit as stop:  # of --help
        codes.append(stop.code)
pathlib.Path("codes.json").write_text(json.dumps(codes))
"""


def test_a_method_is_one_file_and_one_row(tmp_path, model_dir):
    copy = Copy(tmp_path)
    for count, (method, (source, _)) in enumerate(METHODS.items(), 1):
        copy.create(f"fastalign/train/methods/{method}.py", source)
        row = f'    "{method}": {ROWS[method]},\n'
        copy.after("fastalign/train/methods/__init__.py", "METHODS: dict[str, Row] = {\n", row)
        assert len(copy.files) == count + 1 and copy.edits == 2 * count

    write_jsonl(tmp_path / "pairs.jsonl", make_rows(4))
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in make_rows(4)])
    (tmp_path / "rewards.py").write_text(
        "def length(completions):\n    return [float(len(c)) for c in completions]\n"
    )
    commands = []
    for method in METHODS:
        online = "Online" in ROWS[method]
        data = [
            "--data",
            "prompts.jsonl" if online else "pairs.jsonl",
            "--output",
            method,
            "--max-steps",
            "1",
        ]
        own = ["--reward", "rewards:length", "--max-new-tokens", "4"] if online else []
        quiet = ["--no-tensorboard", "--no-progress", "--device", "cpu"]
        train = ["train", method]
        commands += [[*train, "--help"], [*train, "--model", str(model_dir), *data, *own, *quiet]]
    said = copy.run(COMMANDS.format(commands=commands), OMP_NUM_THREADS="1")
    assert json.loads((tmp_path / "codes.json").read_text()) == [0] * len(commands)
    for method, (_, metric) in METHODS.items():
        assert f"  command  fastalign train {method} --model" in said
        record = json.loads((tmp_path / method / "metrics.jsonl").read_text().splitlines()[-1])
        assert record["step"] == 1 and metric in record
        assert record["loss"] == record["loss"] and record["grad_norm"] > 0
        assert (tmp_path / method / "model.safetensors").exists()
