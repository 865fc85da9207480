"""The tiny model of tiny.py on disk, a data file, and a builder of short runs."""

import pytest
import transformers
from online_cases import first_update, online  # noqa: F401  (fixtures of many files)
from tiny import make_model, make_rows, make_tokenizer, write_jsonl

from fastalign.train import TrainConfig

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data_file(tmp_path):
    return write_jsonl(tmp_path / "pairs.jsonl", make_rows())


@pytest.fixture
def config(tmp_path, model_dir, data_file):
    """`config(name=value, ...)`: a short run in tmp_path/out."""

    def build(**settings):
        return TrainConfig(
            **{
                "model": str(model_dir),
                "data": str(data_file),
                "output": str(tmp_path / "out"),
                "batch_size": 4,
                "tokens_per_batch": 256,
                "learning_rate": 1e-3,
                "max_steps": 3,
                "progress": False,
                "tensorboard": False,
                **settings,
            }
        )

    return build


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass
