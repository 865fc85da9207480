"""The trainer's tiny model on disk, and a file for every standard input of a recipe."""

import pytest
import transformers
from train.tiny import make_lists, make_model, make_responses, make_rows, make_tokenizer, write_jsonl

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(num_hidden_layers=1, max_position_embeddings=1024).save_pretrained(
        folder
    )  # a judge's template fits
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, model):
    """Input -> what a user gives for it."""
    folder, pairs = tmp_path_factory.mktemp("data"), make_rows(4)
    rows = {
        "demos": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs],
        "pairs": [{**row, "task": i % 2} for i, row in enumerate(pairs)],
        "labels": make_responses(4),
        "scores": [{**row, "score": float(row["label"])} for row in make_responses(4)],
        "lists": make_lists(4),
        "prompts": [{"prompt": row["prompt"]} for row in pairs],
        "texts": [{"text": row["prompt"] + row["chosen"]} for row in pairs],
    }
    for name, each in rows.items():
        for row in each if name == "scores" else ():
            row.pop("label")
        write_jsonl(folder / f"{name}.jsonl", each)
    files = {name: str(folder / f"{name}.jsonl") for name in rows}
    return {**files, "model": str(model), "judge": str(model)}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass
