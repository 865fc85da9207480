"""What a run may write and remove: nothing foreign, nothing half, nothing through a link, one run at a time;
damage and a full disk are one line."""

import errno
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_rows, without_times, write_jsonl

from fastalign.cli import main as cli
from fastalign.train import TrainingError, UserError, checkpoint, files, train_dpo

RUN = {"max_steps": 4, "save_every": 2, "batch_size": 4}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# --- other people's files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "pytorch_model.bin",
        "adapter_config.json",
        "x.gguf",
    ],
)
def test_a_foreign_model_is_not_replaced_unasked(config, name):
    output = config().output_dir()
    output.mkdir()
    (output / name).write_text("{}")
    with pytest.raises(
        UserError, match=f"holds a model \\({name}\\) that no run of fastalign has written.*--overwrite"
    ):
        train_dpo(config(**RUN))
    assert os.listdir(output) == [name]


def test_overwrite_touches_only_the_model_and_what_a_run_has_left(config):
    output = config().output_dir()
    output.mkdir()
    make_model(seed=9).save_pretrained(output, max_shard_size="20KB")
    mine = dict.fromkeys(
        ("notes.txt", "model-notes.safetensors.md", "model.py", "data.jsonl", ".metrics.jsonl.tmp", "logs/x"),
        b"mine",
    )
    (output / "logs").mkdir()
    for name, text in mine.items():
        (output / name).write_bytes(text)
    train_dpo(config(**RUN, overwrite=True))
    (output / "checkpoints" / "best").mkdir()
    mine |= {"checkpoints/best/weights": b"mine", "checkpoints/step-1": b"mine"}
    for name, text in mine.items():
        (output / name).write_bytes(text)
    train_dpo(config(max_steps=1, overwrite=True))
    assert all((output / name).read_bytes() == text for name, text in mine.items())
    assert sorted(os.listdir(output / "checkpoints")) == ["best", "step-1"]


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "checkpoints/mine", "tensorboard/mine", "value_head.safetensors", "train_config.json"],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_with_the_names_of_ours_are_not_ours(config, name, overwrite):
    """Without a record of a run nothing is removed."""
    path = config().output_dir() / name
    path.parent.mkdir(parents=True)
    path.write_text('{"mine": 1}')
    with pytest.raises(UserError, match="nothing there is removed: choose another directory"):
        train_dpo(config(**RUN, overwrite=overwrite))
    assert path.read_text() == '{"mine": 1}' and len(list(config().output_dir().iterdir())) == 1


def test_an_adapter_or_a_directory_in_the_way(config):
    output = config().output_dir()
    output.mkdir()
    (output / "config.json").mkdir()
    with pytest.raises(UserError, match="config.json is a directory"):
        train_dpo(config(**RUN, overwrite=True))
    (output / "config.json").rmdir()
    (output / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter would be loaded on top"):
        train_dpo(config(**RUN, overwrite=True))


# --- links --------------------------------------------------------------------------------------------------


def test_no_temporary_name_follows_a_link(config, tmp_path):
    output, victim = config().output_dir(), tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "folder").mkdir()
    (output / "checkpoints").mkdir(parents=True)
    for name in (
        "metrics.jsonl.tmp",
        "train_config.json.tmp",
        "ref_logprobs.safetensors.tmp",
        ".metrics.jsonl.tmp",
    ):
        (output / name).symlink_to(victim)
    (output / "model.tmp").symlink_to(tmp_path / "folder")
    (output / "checkpoints" / "step-00000002.tmp").symlink_to(tmp_path / "folder")
    (output / "checkpoints" / "step-00000004.tmp").symlink_to(tmp_path / "nowhere")
    checkpoint.write_record(output, config(), "dpo")
    train_dpo(config(**RUN, precompute_ref=True, overwrite=True))
    assert (
        victim.read_text() == "precious"
        and not list((tmp_path / "folder").iterdir())
        and not (tmp_path / "nowhere").exists()
    )
    assert [path.name for path in checkpoint.checkpoints(output)] == ["step-00000002", "step-00000004"]


def test_a_lock_that_is_a_link(config, tmp_path):
    output, victim = config().output_dir(), tmp_path / "victim"
    output.mkdir()
    (output / files.LOCK).symlink_to(victim)
    with pytest.raises(UserError, match="cannot write .*run.lock"):
        train_dpo(config(**RUN))
    assert not victim.exists()


def test_replaced_files_have_the_usual_permissions(tmp_path):
    files.replace_file(tmp_path / "a", lambda path: path.write_text("x"))
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode and sorted(
        os.listdir(tmp_path)
    ) == ["a", "b"]
    with pytest.raises(ZeroDivisionError):
        files.replace_file(tmp_path / "a", lambda path: 1 / 0)
    assert (tmp_path / "a").read_text() == "x" and sorted(os.listdir(tmp_path)) == ["a", "b"]


# --- two runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [{}, {"overwrite": True}, {"resume": True}])
def test_a_second_run_is_held_off(config, second):
    seen = []

    def start_another(record):
        before = contents(config().output_dir())
        with pytest.raises(
            UserError,
            match=f"another run \\(process {os.getpid()} on .*\\) is writing into the output directory",
        ) as caught:
            train_dpo(config(**RUN, **second))
        assert contents(config().output_dir()) == before
        seen.append(caught)

    train_dpo(config(**RUN), callback=start_another)
    assert len(seen) == 4 and not (config().output_dir() / files.LOCK).exists()


def test_the_lock_of_a_killed_run_holds_nobody_off(config, model_dir, data_file, tmp_path):
    output = config().output_dir()
    program = f"""
        import time
        from fastalign.train import TrainConfig, train_dpo
        config = TrainConfig(model={str(model_dir)!r}, data={str(data_file)!r}, output={str(output)!r}, max_steps=9, save_every=1, progress=False)
        train_dpo(config, callback=lambda record: time.sleep(60 * (record["step"] == 3)))
    """
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while (
        not (output / "checkpoints" / "step-00000002").exists()
        and run.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    with pytest.raises(UserError, match=f"another run \\(process {run.pid} on "):
        train_dpo(config(**RUN, overwrite=True))
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert (output / files.LOCK).exists()
    train_dpo(config(**RUN, overwrite=True))
    assert not (output / files.LOCK).exists()


# --- damage -------------------------------------------------------------------------------------------------


def rewrite(change):
    def damage(path):
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return damage


def moments(state):
    return next(iter(state["optimizer"]["state"].values()))


DAMAGE = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "random bytes": lambda path: path.write_bytes(bytes(range(256)) * 40),
    "text": lambda path: path.write_text("{}"),
    "another pickle": lambda path: path.write_bytes(
        pickle.dumps({"step": 2, "when": time.struct_time(range(9))})
    ),
    "gone": lambda path: path.unlink(),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a list": lambda path: torch.save([1, 2], path),
    "a tensor": lambda path: torch.save(torch.ones(3), path),
    "no keys": lambda path: torch.save({}, path),
    "another version": rewrite(lambda state: state.update(format=1)),
    "no version": rewrite(lambda state: state.pop("format")),
    "a version that is no number": rewrite(lambda state: state.update(format="x" * 5000)),
    **{
        f"without {name}": rewrite(lambda state, name=name: state.pop(name))
        for name in checkpoint._STATE
        if name != "format"
    },
    **{
        f"{name} is a tensor": rewrite(lambda state, name=name: state.update({name: torch.ones(1)}))
        for name in checkpoint._STATE
    },
    "step of another checkpoint": rewrite(lambda state: state.update(step=3)),
    "a negative step": rewrite(lambda state: state.update(step=-2)),
    "a step that is True": rewrite(lambda state: state.update(step=True)),
    "negative tokens": rewrite(lambda state: state.update(tokens=-1)),
    "moments of another shape": rewrite(lambda state: moments(state).update(exp_avg=torch.ones(3))),
    "moments that are not finite": rewrite(lambda state: moments(state)["exp_avg_sq"].fill_(float("nan"))),
    "moments without a number of updates": rewrite(lambda state: moments(state).pop("step")),
    "a negative number of updates": rewrite(lambda state: moments(state).update(step=torch.tensor(-1.0))),
    "moments that are text": rewrite(lambda state: moments(state).update(exp_avg="x")),
    "moments of a weight that is not there": rewrite(
        lambda state: state["optimizer"]["state"].update({999: moments(state)})
    ),
    "no groups": rewrite(lambda state: state["optimizer"].update(param_groups=[])),
    "no moments": rewrite(lambda state: state["optimizer"].pop("state")),
    "a rule's memory": rewrite(lambda state: state["task"]["bco"].update(mean="x")),
    "a rule's memory is gone": rewrite(lambda state: state["task"].clear()),
    "random state": rewrite(lambda state: state["random"].update(cpu=torch.zeros(3))),
    "random state is gone": rewrite(lambda state: state["random"].clear()),
    "weights": lambda path: (path.parent / "model.safetensors").write_bytes(b"x" * 100),
    "weights of another size": lambda path: make_model(hidden_size=16).save_pretrained(path.parent),
    "configuration": lambda path: (path.parent / "config.json").write_text(
        '{"vocab_size": ' + "9" * 5000 + "}"
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir):
    """(arguments of a run that was finished, its output): copied for every case."""
    folder = tmp_path_factory.mktemp("finished")
    data = write_jsonl(folder / "pairs.jsonl", make_rows())
    arguments = [
        "train",
        "dpo",
        "--loss",
        "bco",
        "--model",
        str(model_dir),
        "--data",
        str(data),
        "--no-tensorboard",
        "--no-progress",
    ]
    arguments += ["--max-steps", "2", "--save-every", "2", "--batch-size", "4"]
    assert cli.main([*arguments, "--output", str(folder / "out")]) == 0
    return arguments, folder / "out"


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_one_line(finished, tmp_path, capsys, damage):
    arguments, whole = finished
    output = tmp_path / "out"
    subprocess.run(["cp", "-r", whole, output], check=True)
    damage(output / "checkpoints" / "step-00000002" / "trainer.pt")
    before = contents(output)
    assert cli.main([*arguments, "--output", str(output), "--resume"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"fastalign train: error: [^\n]{20,900}\n", error) and "step-00000002" in error, error
    assert contents(output) == before


def test_an_undamaged_copy_goes_on(finished, tmp_path):
    arguments, whole = finished
    subprocess.run(["cp", "-r", whole, tmp_path / "out"], check=True)
    assert cli.main([*arguments, "--output", str(tmp_path / "out"), "--resume"]) == 0


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '{"loss": 1}', "9" * 5000, "\udcff"],
    ids=["cut", "list", "no step", "digits", "bytes"],
)
def test_damaged_records_are_said(config, capsys, line):
    train_dpo(config(**RUN))
    path = config().output_dir() / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = line
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    result = train_dpo(config(**{**RUN, "max_steps": 5, "resume": True}))
    assert [record["step"] for record in result.history] == [1, 5]
    assert (
        "metrics.jsonl is damaged or incomplete: it keeps the records up to step 1" in capsys.readouterr().out
    )


# --- a full disk --------------------------------------------------------------------------------------------


class Limited:
    """No file may grow beyond this many bytes: what a full disk does to a write, with another error
    number."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("size", [100, 20_000, 160_000])
def test_no_room_for_a_checkpoint(config, tmp_path, size):
    """100 bytes: not even the first record; 20 kB: not the weights; 160 kB: not the optimizer state. The run
    goes on where it was."""
    expected = train_dpo(config(**RUN, output=str(tmp_path / "whole")))

    def fill(record):
        if record["step"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    with (
        Limited(resource.getrlimit(resource.RLIMIT_FSIZE)[0]),
        pytest.raises(TrainingError, match="^cannot write (the checkpoint )?.*out/"),
    ):
        train_dpo(config(**RUN), callback=fill)
    output = config().output_dir()
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000002"] and not (
        output / files.LOCK
    ).exists()
    resumed = train_dpo(config(**RUN, resume=True))
    assert without_times(resumed.history) == without_times(expected.history)


@pytest.mark.parametrize("where", ["save", "final", "record", "cache"])
def test_a_full_disk_is_one_line(finished, tmp_path, capsys, monkeypatch, where):
    arguments, _ = finished
    arguments = [*arguments, "--output", str(tmp_path / "out")]

    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        if where == "save":
            patched.setattr(torch, "save", full)
        elif where == "final":
            patched.setattr(checkpoint, "move_into", full)
        elif where == "record":
            patched.setattr(checkpoint, "write_record", full)
        else:
            patched.setattr("fastalign.train.models.reference.save_file", full)
            arguments.append("--precompute-ref")
        assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"fastalign train: error: cannot write [^\n]*: No space left on device\n", error), (
        error
    )
    if where == "final":
        assert cli.main([*arguments, "--resume"]) == 0
