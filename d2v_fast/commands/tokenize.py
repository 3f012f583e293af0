"""`d2v-fast tokenize`: train a tokenizer, or tokenize the text of a configuration before a run does."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from d2v_fast.command_lines import path_override
from d2v_fast.config import ConfigError, TextDataConfig, apply_overrides, load_config
from d2v_fast.config.errors import check
from d2v_fast.data.listing import print_listing
from d2v_fast.errors import OptionError
from d2v_fast.memory.peak import format_bytes
from d2v_fast.modalities import all_modalities, modality_of


def tokenize(file: Path, overrides: Sequence[str] = ()) -> str:
    """Tokenize the text of a configuration into the cache that training reads; returns lines for the user.

    Raises:
        ConfigError: The configuration is refused, or its modality has no tokens.
        DataError: There is no text or no tokenizer, too much is unreadable, or the tokens cannot be written.
    """
    config = load_config(file, overrides).d2v
    make = modality_of(config).tokenize
    if make is None:
        named = " or ".join(f'"{one.name}"' for one in all_modalities() if one.tokenize is not None)
        raise ConfigError([f'`d2v.modality` must be {named}, but is "{config.modality}" instead.'], str(file))
    dataset = make(config)
    tokens, found = dataset.tokens, dataset.tokens.manifest
    size = sum(entry.stat().st_size for entry in tokens.folder.iterdir())
    lines = [
        f"tokenize: {tokens.num_tokens:,} tokens of {tokens.num_documents:,} documents, "
        f"{len(dataset):,} blocks of at most {dataset.block_size} tokens",
        f"cache: {tokens.folder} ({format_bytes(size)})",
    ]
    left_out = {"empty": found["num_empty"], "too short": found["num_short"], "unreadable": found["num_unreadable"]}
    if any(left_out.values()):
        lines.append("left out: " + ", ".join(f"{count:,} {why}" for why, count in left_out.items() if count))
    lines += [f"  {text}" for text in found["unreadable"]]
    return "\n".join(lines)


def new_tokenizer(source: Path, vocab_size: int | None, to: Path | None, overrides: Sequence[str] = ()) -> str:
    """Train a byte-level BPE on text; returns lines for the user.

    Args:
        source: A text file, or a folder of text files.
        vocab_size: Number of tokens.
        to: The folder to write; it must not exist.
        overrides: `d2v.data.KEY=VALUE` each; they say how the text is read.
    Raises:
        ConfigError: An override is refused.
        DataError: There is no text, or the folder cannot be written.
        OptionError: `vocab_size` or `to` is missing, or `vocab_size` is too small.
    """
    if vocab_size is None or to is None:
        raise OptionError("`--train` needs `--vocab-size N` and `--to FOLDER`.")
    raw = apply_overrides({}, overrides)
    given = raw.pop("d2v", {})
    section = given.pop("data", {}) if isinstance(given, dict) else {}
    problems = [f"`{key}` has no effect on a tokenizer: only `d2v.data.KEY` has." for key in [*raw, *given]]
    # the tokenizer does not exist yet and is not read
    section = {**section, "kind": "text", "path": str(source), "tokenizer": str(to)}
    data, found = check(TextDataConfig, section, "d2v.data")
    if data is None or problems:
        raise ConfigError([*problems, *found], "options")
    from d2v_fast.modalities.text.files import TextFiles
    from d2v_fast.modalities.text.tasks import make_tokenizer
    from d2v_fast.modalities.text.tokenizer import MIN_VOCAB_SIZE, missing_tokens

    if vocab_size < MIN_VOCAB_SIZE:
        raise OptionError(f"`--vocab-size` must be >= {MIN_VOCAB_SIZE}, but is {vocab_size} instead.")
    print_listing(TextFiles(data).listing, "text")
    tokenizer = make_tokenizer(data, vocab_size, to)
    option = shlex.join(path_override("d2v.data.tokenizer", to))
    line = f"tokenize: {to} ({tokenizer.vocab_size:,} tokens); for a run: {option}"
    short = missing_tokens(tokenizer, vocab_size)
    return line if short is None else f"{line}\nit has {short}"
