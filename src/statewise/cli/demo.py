"""``statewise demo``: the whole way on this machine, in minutes: train, stop, resume, measure, write, carry on, verify.

Everything is done with the calls a user has; nothing here is special to the demonstration but its sizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from statewise.cli import COMMANDS
from statewise.cli.options import from_arguments

if TYPE_CHECKING:
    from statewise.text import Corpus
    from statewise.training import TrainConfig

__all__ = ["Options", "main"]

# The largest learning rate that this small a model trains steadily at; the official one is meant for days, not minutes.
_SIZES: dict[str, Any] = {"num_layers": 4, "width": 128, "context": 128, "batch_size": 8, "learning_rate": 4e-3}
_SCHEDULE: dict[str, Any] = {"schedule": "cosine", "final_learning_rate": 2e-4}
_PROMPT = "def "


@dataclass(frozen=True)
class Options:
    """What the command line may say."""

    out: Annotated[Path, "folder of the run; a used one is left alone, and a number is added to the name"] = Path(
        "out/demo"
    )
    data: Annotated[str, "stdlib (this Python's own library), a file or a folder"] = "stdlib"
    model: Annotated[str, "rwkv4, rwkv7 or mamba; rwkv4 learns most in the same minutes"] = "rwkv4"
    steps: Annotated[int, "optimiser steps"] = 600
    sample: Annotated[int, "tokens to write"] = 400
    seed: Annotated[int, "of the weights, the order of the data and the sample"] = 0
    json: Annotated[bool, "print one JSON document at the end; the story then goes to standard error"] = False


def main(arguments: Sequence[str]) -> int:
    """Run the command; exit code 1 when something that was to be shown did not show. See :func:`statewise.cli.main`."""
    options = from_arguments(Options, arguments, prog="statewise demo", description=COMMANDS["demo"])
    if options.steps < 2:
        raise ValueError(f"--steps is {options.steps}; 2 or more are accepted (the run is stopped half-way)")
    if options.sample < 2:
        raise ValueError(f"--sample is {options.sample}; 2 or more are accepted (the text is stopped half-way)")
    started = time.perf_counter()
    story = contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext()
    with story, _one_thread():
        report = _tell(options)
        report["seconds"] = time.perf_counter() - started
        failed = [name for name, held in report["shown"].items() if not held]
        print(f"\n{report['seconds']:.0f} s in all." + (f" NOT SHOWN: {'; '.join(failed)}" if failed else ""))
    if options.json:
        from statewise.cli.console import print_json

        print_json(report)
    return 1 if failed else 0


def _tell(options: Options) -> dict[str, Any]:
    """The story, from the text to the laws; what is to be shown is judged at its end."""
    from statewise.cli.evaluate import yardsticks
    from statewise.text import load_corpus
    from statewise.training import TrainConfig

    corpus = load_corpus(options.data)
    _head("The text", corpus.description)
    if not len(corpus.test):
        raise ValueError(f"{options.data} has no test split: it is too short to hold text out")
    beside = yardsticks(corpus.test)

    out = _fresh(options.out)
    config = TrainConfig(
        model=options.model,
        data=options.data,
        out=str(out),
        steps=options.steps,
        seed=options.seed,
        log_every=max(1, options.steps // 20),
        eval_every=max(1, options.steps // 4) if len(corpus.valid) > 1 else 0,
        save_every=options.steps,
        **_SIZES,
        **_SCHEDULE,
    )
    sizes = f"{config.num_layers} layers of {config.width}, {config.batch_size} x {config.context} bytes a step"
    _head("Training", f"{config.model}: {sizes}, on one thread, into {out}")
    losses, stopped_at = _train_with_a_stop(config)
    return _look_at(config, corpus, beside, losses, stopped_at, options)


def _look_at(
    config: TrainConfig,
    corpus: Corpus,
    beside: dict[str, float],
    losses: list[float],
    stopped_at: int,
    options: Options,
) -> dict[str, Any]:
    """Everything after the training."""
    import torch

    from statewise.cli.checkpoints import open_model
    from statewise.cli.console import print_table, progress
    from statewise.inference import evaluate_bits_per_byte

    out = Path(config.out)
    _head("Resuming is exact", "a small run of 12 steps, and the same stopped at 6 and resumed")
    exact = _resume_is_exact(config)
    print(f"weights, optimiser and records are {'the same, bit for bit' if exact else 'NOT the same'}")

    _head("Held-out text", f"the test split: {len(corpus.test):,} bytes the model has never seen")
    model = open_model(out, device=torch.device("cpu"), dtype=torch.float32).model
    with progress(len(corpus.test), "evaluate") as bar:
        measured = evaluate_bits_per_byte(
            model, corpus.test, window=4096, progress=lambda done, bits: bar(done, f"{bits:.3f} bits/byte")
        )
    bits = measured["bits_per_byte"]
    rows = [("order-0 entropy of the same text", beside["order0_bits_per_byte"])]
    rows += [("order-1 entropy of the same text", beside["order1_bits_per_byte"])]
    rows += [("gzip -9", beside["gzip_bits_per_byte"]), ("xz -9e", beside["xz_bits_per_byte"])]
    rows += [(f"{config.model} after {config.steps} steps", bits)]
    print_table(["", "bits per byte"], [(name, f"{value:.3f}") for name, value in rows])
    print(f"loss curve: {out / 'loss.png'}")

    continued = _write_and_go_on(model, out, options)
    laws = _verify_all()
    return {
        **beside,
        "bits_per_byte": bits,
        "perplexity": measured["perplexity"],
        "out": str(out),
        "plot": str(out / "loss.png"),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "stopped_at": stopped_at,
        "shown": {
            "the loss falls": losses[-1] < losses[0],
            "held-out text costs well below its order-0 entropy": bits < 0.8 * beside["order0_bits_per_byte"],
            "held-out text costs well below its order-1 entropy": bits < 0.8 * beside["order1_bits_per_byte"],
            "a resumed run is the unbroken run": exact,
            "writing goes on from a saved state": continued,
            "every law holds": laws,
        },
    }


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A model this small gains a fifth from a second thread. On a machine that does something else too it loses far
    more: two threads that wait for each other were seen to slow a step from 0.15 s to 10 s."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _head(title: str, text: str) -> None:
    print(f"\n== {title} ==\n{text}", flush=True)


def _fresh(out: Path) -> Path:
    """``out``, or with the first number added that makes it new."""
    candidate, number = out, 1
    while candidate.exists() and (not candidate.is_dir() or any(candidate.iterdir())):
        number += 1
        candidate = out.with_name(f"{out.name}-{number}")
    return candidate


def _train_with_a_stop(config: TrainConfig) -> tuple[list[float], int]:
    """Train, interrupted half-way as by Ctrl-C, and resume. Returns the losses told, and where the run stopped."""
    from statewise.training import train
    from statewise.training.display import Display

    losses: list[float] = []

    def sitting(config: TrainConfig, stop_at: int | None) -> Any:
        display = Display(sys.stdout)

        def show(report: Mapping[str, Any]) -> None:
            losses.append(report["loss"])
            display(report)
            if stop_at is not None and report["step"] >= stop_at:
                signal.raise_signal(signal.SIGINT)

        with contextlib.closing(display):
            return train(config, progress=show)

    first = sitting(config, config.steps // 2)
    print(f"stopped at step {first.step}, as by Ctrl-C; snapshot: {first.snapshot}\nresumed:", flush=True)
    last = sitting(dataclasses.replace(config, resume=True), None)
    print(f"done: {last.tokens:,} bytes read in {last.seconds:.0f} s; snapshot: {last.snapshot}")
    return losses, first.step


def _resume_is_exact(config: TrainConfig) -> bool:
    """Whether a stopped and resumed run ends with the files of an unbroken one."""
    from statewise.training import train

    small = dataclasses.replace(
        config, num_layers=1, width=64, context=32, steps=12, save_every=12, log_every=3, eval_every=0
    )
    small = dataclasses.replace(small, tensorboard=False, plot=False)
    with tempfile.TemporaryDirectory() as folder:
        runs = [dataclasses.replace(small, out=str(Path(folder) / name)) for name in ("unbroken", "broken")]
        whole = train(runs[0], progress=lambda report: None)
        train(dataclasses.replace(runs[1], save_every=6), progress=_stop_at(6))
        resumed = train(dataclasses.replace(runs[1], resume=True), progress=lambda report: None)
        names = sorted(path.name for path in whole.snapshot.iterdir() if path.suffix == ".safetensors")
        same = [(whole.snapshot / name).read_bytes() == (resumed.snapshot / name).read_bytes() for name in names]
        return len(names) > 1 and all(same) and whole.loss == resumed.loss


def _stop_at(step: int) -> Callable[[Mapping[str, Any]], None]:
    def show(report: Mapping[str, Any]) -> None:
        if report["step"] >= step:
            signal.raise_signal(signal.SIGINT)

    return show


def _write_and_go_on(model: Any, out: Path, options: Options) -> bool:
    """Stream a sample in two parts with a saved state between; whether greedy parts equal the whole."""
    from statewise.cli.console import write_text
    from statewise.inference import generate, load_session, save_session
    from statewise.text import load_tokenizer

    tokenizer, path = load_tokenizer("bytes"), out / "state.safetensors"
    first, second = options.sample // 2, options.sample - options.sample // 2
    _head("Writing", f"{first} bytes after {_PROMPT!r}, then the state is saved, read back, and {second} more follow")

    def stream(prompt: list[int], count: int, **how: Any) -> list[int]:
        run = generate(model, prompt, max_tokens=count, **how)
        decoder, ids = tokenizer.decoder(), []
        for token in run:
            ids.append(token)
            write_text(decoder.push(token))
        write_text(decoder.finish())
        save_session(path, run.state, run.pending)
        return ids

    write_text(_PROMPT)
    stream(tokenizer.encode(_PROMPT), first, temperature=0.7, seed=options.seed)
    state, pending = load_session(path)
    assert pending is not None  # at least one token was sampled
    print(f"\n-- state saved ({path.stat().st_size:,} bytes) and read back --")
    stream([pending], second, state=state, temperature=0.7, seed=options.seed + 1)
    print()

    prompt = tokenizer.encode(_PROMPT)
    whole = list(generate(model, prompt, max_tokens=60, temperature=0))
    head = generate(model, prompt, max_tokens=25, temperature=0)
    ids = list(head)
    save_session(path, head.state, head.pending)
    state, pending = load_session(path)
    assert pending is not None
    same = ids + list(generate(model, [pending], max_tokens=35, temperature=0, state=state)) == whole
    print(
        f"greedily, 25 bytes and 35 from the saved state are {'the same as' if same else 'NOT the same as'} 60 at once"
    )
    return same


def _verify_all() -> bool:
    """The promise, on a fresh model of each kind."""
    import torch

    from statewise.cli.verify import print_laws
    from statewise.inference import stir, verify
    from statewise.models import create, list_models

    _head("The promise", "every form of every model gives the same answer (float64, relative differences)")
    held = True
    for name in list_models("language"):
        torch.manual_seed(0)
        model = create(name, vocab_size=256, num_layers=3, width=128).double()
        stir(model)
        results = verify(model)
        print_laws(results, name)
        held &= all(result.ok for result in results)
    return held
