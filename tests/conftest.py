"""What many tests share: small real things, made once. Nothing here is mocked; a toy tokenizer trains in a moment."""

import json
import os
import signal
from pathlib import Path

import pytest

# Workers of a parallel run share the cores; more threads than cores make tiny models slower, not faster.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Started in the background of a shell, a process ignores Ctrl-C, and so would all that the tests start to interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def signals_as_before():
    """Scripts that end within this process leave it deaf to Ctrl-C, and with it all that later tests start."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind at all.",
    "She sells sea shells by the sea shore. 12 shells, 34 shells, 567 shells!",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "从前有座山，山里有座庙，庙里有个老和尚在讲故事。",
    "def add(a, b):\n    return a + b  # 3 + 4 = 7\n",
    "Where does the fox live? It lives in the forest. 狐狸住在哪里？它住在森林里。",
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    from etude.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS * 3, folder, vocab_size=320)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    from etude.tokenizer import Tokenizer

    return Tokenizer(tokenizer_folder)


@pytest.fixture
def tiny_config(tokenizer):
    from etude.model.config import EtudeConfig

    return EtudeConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=64, initializer_range=0.2,
        eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id,
    )  # fmt: skip


@pytest.fixture
def tiny_model(tiny_config):
    import torch

    from etude.model.transformer import Etude

    torch.manual_seed(0)
    return Etude(tiny_config).eval()


def write_jsonl(path: Path, records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def text_file(tmp_path) -> Path:
    """120 short documents, all different."""
    documents = ({"text": f"{number}. {TEXTS[number % len(TEXTS)]} {number * 7}"} for number in range(120))
    return write_jsonl(tmp_path / "text.jsonl", documents)


@pytest.fixture
def chat_file(tmp_path) -> Path:
    """60 short conversations of one or two rounds."""

    def conversation(number: int) -> list[dict[str, str]]:
        turns = [
            {"role": "user", "content": f"What is {number} + 1?"},
            {"role": "assistant", "content": f"It is {number + 1}."},
        ]
        if number % 2:
            turns += [{"role": "user", "content": "谢谢！"}, {"role": "assistant", "content": f"不客气 {number}。"}]
        return turns

    return write_jsonl(tmp_path / "chat.jsonl", ({"conversations": conversation(number)} for number in range(60)))
