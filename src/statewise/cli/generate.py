"""``statewise generate``: continue a prompt.

A file written by ``--save-state`` holds the state and the last token sampled, which that state has not read. A run that
starts from it reads that token first, and after it the prompt, if there is one: sampling greedily, A tokens and then B
from the saved state are the same tokens as A + B at once. (The penalties and the seed start anew in each run.)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from statewise.cli import COMMANDS
from statewise.cli.options import Dtype, from_arguments

__all__ = ["Options", "main"]


@dataclass(frozen=True)
class Options:
    """What the command line may say."""

    checkpoint: Annotated[
        str, "a checkpoint file or directory, a run's folder (its latest snapshot), or hf://owner/name"
    ]
    prompt: Annotated[str | None, "text to continue; - reads standard input"] = None
    prompt_file: Annotated[Path | None, "a UTF-8 file whose text is continued"] = None
    max_tokens: Annotated[int, "how many tokens to write"] = 200
    seed: Annotated[int | None, "makes the draws the same every time"] = None
    temperature: Annotated[float, "logits are divided by it; 0 always takes the likeliest token"] = 1.0
    top_p: Annotated[float, "draw among the likeliest tokens that together have this probability"] = 1.0
    top_k: Annotated[int, "draw among the k likeliest tokens; 0 means all"] = 0
    presence_penalty: Annotated[float, "taken off the logit of every token already written"] = 0.0
    frequency_penalty: Annotated[float, "taken off a token's logit for each time it was written"] = 0.0
    state: Annotated[Path | None, "start from this saved state (the prompt may then be left out)"] = None
    save_state: Annotated[Path | None, "save the state at the end, to be continued with --state"] = None
    tokenizer: Annotated[str | None, "bytes, rwkv-world, or a file; by default what the model was trained with"] = None
    device: Annotated[str, "where to run"] = "cpu"
    dtype: Annotated[Dtype, "precision of the model"] = "float32"
    json: Annotated[bool, "print one JSON document at the end instead of streaming"] = False


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :func:`statewise.cli.main`."""
    options = from_arguments(Options, arguments, prog="statewise generate", description=COMMANDS["generate"])
    text = _prompt(options)
    if options.save_state is not None and not options.save_state.parent.is_dir():
        raise ValueError(f"--save-state: {options.save_state.parent} is no directory")

    import torch

    from statewise.cli.checkpoints import DTYPES, find_device, open_model, tokenizer_for
    from statewise.cli.console import print_json, write_text
    from statewise.inference import generate, load_session, save_session

    opened = open_model(options.checkpoint, device=find_device(options.device), dtype=DTYPES[options.dtype])
    tokenizer = tokenizer_for(opened, options.tokenizer)
    state, pending = (None, None) if options.state is None else load_session(options.state)
    ids = ([] if pending is None else [pending]) + tokenizer.encode(text)
    if not ids:
        raise ValueError(
            "the prompt has no tokens; at least one is needed"
            if options.state is None
            else f"{options.state} names no token to go on from, so a prompt of at least one token is needed"
        )
    started = time.perf_counter()
    run = generate(
        opened.model,
        ids,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        stop=[] if tokenizer.end_id is None else [tokenizer.end_id],
        seed=options.seed,
        state=state,
        vocab_size=tokenizer.vocab_size,  # rows beyond it, and gaps within it, have no text
        suppress=tokenizer.unused_ids,
    )
    read = time.perf_counter()
    decoder = tokenizer.decoder()
    tokens: list[int] = []
    count = 0
    for token in run:
        count += 1
        if options.json:
            tokens.append(token)
        else:
            write_text(decoder.push(token))
    if not options.json:
        write_text(decoder.finish())
        if sys.stdout.isatty():
            write_text("\n")
    if options.save_state is not None:
        try:
            save_session(options.save_state, run.state, run.pending)
        except OSError as error:
            raise ValueError(f"--save-state: {options.save_state} cannot be written: {error.strerror}") from error
    if options.json:
        spent = time.perf_counter() - read
        print_json(
            {
                "text": tokenizer.decode(tokens),
                "tokens": tokens,
                "prompt_tokens": len(ids),
                "prompt_seconds": read - started,
                "seconds": spent,
                "tokens_per_second": count / spent if spent > 0 else None,
                "threads": torch.get_num_threads(),
                "state_saved": None if options.save_state is None else str(options.save_state),
            }
        )
    return 0


def _prompt(options: Options) -> str:
    """The text to continue, from wherever it comes."""
    if options.prompt is not None and options.prompt_file is not None:
        raise ValueError("--prompt and --prompt-file: one of them is accepted")
    if options.prompt_file is not None:
        return _utf8(options.prompt_file.read_bytes(), str(options.prompt_file))
    if options.prompt == "-":
        return _utf8(sys.stdin.buffer.read(), "standard input")
    if options.prompt is None:
        if options.state is None:
            raise ValueError("a prompt is needed: --prompt TEXT, --prompt-file FILE, or --state FILE")
        return ""
    # The shell's bytes that were not UTF-8 arrive as lone surrogates.
    return _utf8(options.prompt.encode("utf-8", "surrogateescape"), "--prompt")


def _utf8(content: bytes, origin: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{origin} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}") from None
