"""The evaluation harness on models of this package, against plain loops."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import statewise
from statewise.text import load_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: `make parity` installs it")

from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from statewise.bridges.lm_eval import StatewiseLM
from tests.docs.markdown_page import blocks

LIMIT = 1e-9  # float64: only the order of sums differs


class WidePairs:
    """A byte ``c`` as the two ids ``c, 0``: what a model that was trained on 16-bit units reads."""

    name = "wide-bytes"
    vocab_size = 256
    unused_ids: frozenset[int] = frozenset()
    end_id: int | None = None

    def __init__(self) -> None:
        self._bytes = load_tokenizer("bytes")

    def encode(self, text: str) -> list[int]:
        return [token for byte in self._bytes.encode(text) for token in (byte, 0)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._bytes.decode(list(ids)[::2])

    def decoder(self) -> Any:
        inner, count = self._bytes.decoder(), -1

        def push(token: int) -> str:
            nonlocal count
            count += 1
            return "" if count % 2 else inner.push(token)

        return SimpleNamespace(push=push, finish=inner.finish)


def build(name: str = "rwkv7", **options: Any) -> Any:
    torch.manual_seed(5)
    sizes = {"head_size": 16} if name == "rwkv7" else {"tie_embeddings": False}
    model = statewise.create(name, vocab_size=256, num_layers=2, width=32, **sizes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return StatewiseLM(model, **options)


def ask(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments, task_name=None)


@torch.no_grad()
def plain(model: Any, context: list[int], answer: list[int]) -> tuple[float, bool]:
    """One token at a time, from the beginning."""
    state, total, greedy, logits = model.init_state(1), 0.0, True, torch.empty(0)
    for index, token in enumerate([*context, *answer]):
        if index >= len(context):
            total += float(logits.double().log_softmax(-1)[0, token])
            greedy &= int(logits.argmax()) == token
        logits, state = model.step(torch.tensor([token]), state)
    return total, greedy


PAIRS = [
    ("A question?", " yes"),
    ("A question?", " no, not at all"),
    ("short", " x"),
    ("A rather longer context, longer than a window of the test is", " and its answer"),
    ("A question?", " yes"),
    ("trailing spaces  ", "moved"),
    ("ünïcödé", " 漢"),
    ("", "nothing before it"),
    ("z", "y"),
]


@pytest.mark.parametrize("name", ["rwkv7", "mamba"])
@pytest.mark.parametrize("options", [{}, {"batch_size": 4, "window": 7}, {"batch_size": "auto", "add_bos_token": True}])
def test_likelihoods_are_those_of_a_plain_loop(name: str, options: dict[str, Any]) -> None:
    lm = build(name, **options)
    results = lm.loglikelihood([ask(*pair) for pair in PAIRS])
    for (context, answer), (score, greedy) in zip(PAIRS, results, strict=True):
        ids = list((context.rstrip() + context[len(context.rstrip()) :] + answer).encode())
        before = list(context.rstrip().encode())
        bos = [0] if not context or options.get("add_bos_token") else []
        want, likeliest = plain(lm.model, bos + before, ids[len(before) :])
        assert score == pytest.approx(want, rel=LIMIT)
        assert greedy == likeliest


def test_greedy_is_told_from_not() -> None:
    """What the model would say itself is greedy; with its last byte changed it is not."""
    lm = build()
    prompt = [65, 66, 67]
    said = list(statewise.generate(lm.model, prompt, max_tokens=6, temperature=0))
    wrong = [*said[:-1], (said[-1] + 1) % 256]
    scored = lm._loglikelihood_tokens([(None, prompt, said), (None, prompt, wrong), (None, prompt, said[:1])])
    assert [greedy for _, greedy in scored] == [True, False, True]


@pytest.mark.parametrize("options", [{}, {"batch_size": 3, "window": 5}])
def test_whole_documents_at_any_length(options: dict[str, Any]) -> None:
    lm = build(**options)
    texts = ["", "a", "A document. " * 9, "another, of another length", "ü" * 40]
    results = lm.loglikelihood_rolling([ask(text) for text in texts])
    assert results[0] == 0.0
    for text, score in zip(texts[1:], results[1:], strict=True):
        assert score == pytest.approx(plain(lm.model, [0], list(text.encode()))[0], rel=LIMIT)


def test_a_context_is_read_once_for_all_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build(batch_size=8)
    read = 0
    forward = type(lm.model).forward

    def counting(self: Any, tokens: torch.Tensor, *rest: Any, **ragged: Any) -> Any:
        nonlocal read
        read += tokens.numel()
        return forward(self, tokens, *rest, **ragged)

    monkeypatch.setattr(type(lm.model), "forward", counting)
    lm.loglikelihood([ask("c" * 100, answer) for answer in (" ab", " cd", " ef", " gh")])
    assert read == 100 + 4 * 2


def continued(lm: Any, context: str, **options: Any) -> str:
    return lm.generate_until([ask(context, options)])[0]


def test_generation_stops_where_it_should() -> None:
    lm = build()
    ids = list(statewise.generate(lm.model, list(b"Once"), max_tokens=40, temperature=0))
    whole = lm.tokenizer.decode(ids)
    assert continued(lm, "Once", max_gen_toks=40) == whole
    assert continued(lm, "Once", max_gen_toks=40, until=[]) == whole
    assert continued(lm, "Once", max_gen_toks=3, until=["never said"]) == lm.tokenizer.decode(ids[:3])
    stop = whole[7:10]
    assert continued(lm, "Once", max_gen_toks=40, until=stop) == whole[: whole.index(stop)]
    assert (
        continued(lm, "Once", max_gen_toks=40, until=[whole[9:11], stop, ""])
        == whole[: min(whole.index(stop), whole.index(whole[9:11]))]
    )
    assert continued(build(eot_token_id=ids[5]), "Once", max_gen_toks=40) == lm.tokenizer.decode(
        ids[: ids.index(ids[5])]
    )
    assert continued(lm, "", max_gen_toks=4) == lm.tokenizer.decode(
        list(statewise.generate(lm.model, [0], max_tokens=4, temperature=0))
    )


def test_the_tokenizer_says_what_ends_and_what_is_nothing() -> None:
    ids = list(statewise.generate(build().model, list(b"Once"), max_tokens=40, temperature=0))
    marked: Any = load_tokenizer("bytes")
    marked.end_id = ids[5]
    lm = build(tokenizer=marked)
    assert lm.eot_token_id == ids[5]
    assert continued(lm, "Once", max_gen_toks=40) == marked.decode(ids[: ids.index(ids[5])])
    marked = load_tokenizer("bytes")
    marked.unused_ids = frozenset(ids[:1])
    assert continued(build(tokenizer=marked), "Once", max_gen_toks=1) != marked.decode(ids[:1])


def test_sampling_is_generates_own() -> None:
    lm = build(seed=11)
    options = {"max_gen_toks": 30, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 50}
    first, second = lm.generate_until([ask("Once", options), ask("Once", options)])
    rule = {"max_tokens": 30, "temperature": 0.8, "top_p": 0.9, "top_k": 50}
    for seed, text in ((11, first), (12, second)):
        assert text == lm.tokenizer.decode(list(statewise.generate(lm.model, list(b"Once"), seed=seed, **rule)))
    assert first != second
    plain_lm = build()
    texts = []
    for _ in range(2):
        torch.manual_seed(1)
        texts.append(continued(plain_lm, "Once", **options))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"window": 0}, "window is 0"),
        ({"dtype": "int64"}, "dtype is 'int64'"),
        ({"dtype": "floaty"}, "dtype is 'floaty'"),
        ({"eot_token_id": 256}, "eot_token_id is 256"),
        ({"prefix_token_id": None}, "prefix_token_id is None"),
        ({"tokenizer": SimpleNamespace(vocab_size=257, end_id=None)}, "tokenizer has 257 ids"),
        ({"head_size": 16}, "head_size cannot be given"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_cuda_where_there_is_none_is_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    """The harness's command asks for cuda:0 when nobody asked for anything."""
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    assert build(device="cuda:0").device == torch.device("cpu")
    assert "the CPU is used" in caplog.text


def test_requests_that_make_no_sense() -> None:
    lm = build()
    with pytest.raises(ValueError, match="a continuation is empty"):
        lm.loglikelihood([ask("a", "b"), ask("a", "")])
    with pytest.raises(ValueError, match="'beams' is not known"):
        continued(lm, "a", beams=4)
    with pytest.raises(ValueError, match="top_p"):
        continued(lm, "a", do_sample=True, temperature=1.0, top_p=3.0)


LAMBADA = {
    "task": "lambada_local",
    "dataset_path": "json",
    "output_type": "loglikelihood",
    "test_split": "test",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}
OURS_ALONE = TaskManager(include_defaults=False)  # the harness's own thousands take it half a minute to list
TINY = "rwkv_cpp_tiny/tiny-rwkv-6v0-3m-from-Q5_1.safetensors"


def test_the_harness_runs_lambada(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the harness asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    text = shared / "data/text/lambada_test.jsonl"
    lm = StatewiseLM(shared / "weights" / TINY, WidePairs(), batch_size=8)
    files = {"data_files": {"test": str(text)}, "cache_dir": str(tmp_path)}
    rows = 40
    found = simple_evaluate(
        lm, tasks=[{**LAMBADA, "dataset_kwargs": files}], limit=rows, bootstrap_iters=0, task_manager=OURS_ALONE
    )
    assert found is not None
    scores = found["results"]["lambada_local"]

    total, right = 0.0, 0
    for line in text.read_text("utf-8").splitlines()[:rows]:
        context, _, word = json.loads(line)["text"].rpartition(" ")
        before, answer = lm.tokenizer.encode(context), lm.tokenizer.encode(f" {word}")
        with torch.no_grad():
            logits, _ = lm.model(torch.tensor([[*before, *answer]]))
        scored = logits[0, len(before) - 1 : -1]
        total += float(scored.log_softmax(-1)[torch.arange(len(answer)), answer].double().sum())
        right += scored.argmax(-1).tolist() == answer
    assert scores["perplexity,none"] == pytest.approx(math.exp(-total / rows), rel=1e-4)
    assert scores["acc,none"] == right / rows
    # Some three bits a byte for words of six letters and a space; a guess among bytes would give 1e16.
    assert 1e4 < scores["perplexity,none"] < 1e7


@pytest.mark.long
def test_the_harness_command_line(tmp_path: Path) -> None:
    """By name, from a shell: a saved model, arguments as text, a task in YAML, results in JSON."""
    assert get_model("statewise") is StatewiseLM
    lm = build()
    statewise.save(lm.model, tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {i} ends so"}) + "\n" for i in range(5)))
    task = {"task": "rolling_local", "output_type": "loglikelihood_rolling", "test_split": "test", "doc_to_text": ""}
    task |= {"dataset_path": "json", "doc_to_target": "{{text}}"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path)}}
    task |= {"metric_list": [{"metric": "bits_per_byte"}]}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/rolling_local.yaml").write_text(json.dumps(task))  # JSON is YAML
    arguments = f"pretrained={tmp_path / 'model'},tokenizer=bytes,dtype=float64,window=4"
    command = [sys.executable, "-m", "statewise.bridges.lm_eval", "run", "--model", "statewise"]
    command += ["--model_args", arguments, "--tasks", "rolling_local", "--include_path", str(tmp_path / "tasks")]
    command += ["--batch_size", "2", "--output_path", str(tmp_path / "results.json")]
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "it/s" not in done.stderr.partition("Running rolling requests")[2]
    (written,) = tmp_path.glob("results*.json")
    got = json.loads(written.read_text())
    texts = [f"row {i} ends so" for i in range(5)]
    nats = -sum(plain(lm.model, [0], list(text.encode()))[0] for text in texts)
    bits = nats / math.log(2) / sum(map(len, texts))
    assert got["results"]["rolling_local"]["bits_per_byte,none"] == pytest.approx(bits, rel=LIMIT)
    assert got["config"]["model_dtype"] == "torch.float64"


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs/bridges_lm_eval_and_peft.md"
    chosen = [block.text for block in blocks(page.read_text("utf-8")) if "lm_eval" in block.info]
    assert chosen
    exec("\n".join(chosen), {})
