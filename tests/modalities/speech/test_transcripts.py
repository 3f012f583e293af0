"""Transcripts and classes of a user's recordings, the vocabulary, decoding and error rates."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from d2v_fast.errors import DataError
from d2v_fast.evaluation.word_errors import count_errors
from d2v_fast.modalities.speech.recognition import beam_decoder, greedy_transcripts
from d2v_fast.modalities.speech.transcripts import folder_labels, letter_labels, librispeech_labels, table_labels
from d2v_fast.modalities.speech.vocabulary import Vocabulary, normalized_text, read_vocabulary, vocabulary_of
from d2v_fast.objectives.finetune import Beam
from d2v_fast.packages import MissingPackageError
from tests.helpers.audio_files import RATE, make_dataset, tone

NAMES = ["a/one.flac", "a/two.flac", "b/three.flac"]
FIELDS = ("path", "text")


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_letters_follow_the_order_of_the_manifest(tmp_path: Path) -> None:
    path = write(tmp_path / "train.ltr", "T W O |\nT H R E E | A M |\nO N E |\n\n")
    found = letter_labels(path, [NAMES[1], NAMES[2], NAMES[0]], NAMES)
    assert found.texts == ("ONE", "TWO", "THREE AM")
    with pytest.raises(DataError, match=r"a line for each of the 2 recordings of its manifest, but holds 3 lines"):
        letter_labels(path, NAMES[:2], NAMES)


def test_librispeech_names_recordings_without_ending(tmp_path: Path) -> None:
    write(tmp_path / "a" / "a.trans.txt", "one FIRST OF ALL\nfour NOT HERE\n\n")
    write(tmp_path / "b" / "b.trans.txt", "three THIRD\n")
    found = librispeech_labels(str(tmp_path), NAMES)
    assert found.texts == ("FIRST OF ALL", None, "THIRD")
    assert found.notes == ("not used: 1 row of `*.trans.txt` without a recording",)
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match=r"must have transcripts, but '.*/c' holds no `\*\.trans\.txt`"):
        librispeech_labels(str(tmp_path / "c"), ["x.flac"])


@pytest.mark.parametrize("ending", [".tsv", ".jsonl"])
def test_tables(tmp_path: Path, ending: str) -> None:
    rows = [("a/one", 'say "one"'), (str(tmp_path / "a/two.flac"), "two"), ("./b/three.flac", "3"), ("x.wav", "no")]
    if ending == ".tsv":
        text = "id\tpath\ttext\n" + "".join(f"0\t{name}\t{label}\n" for name, label in rows)
    else:
        text = "".join(json.dumps({"path": name, "text": label, "id": [0]}) + "\n" for name, label in rows)
    path = write(tmp_path / f"table{ending}", text)
    found = table_labels(path, str(tmp_path), NAMES, FIELDS)
    assert found.texts == ('say "one"', "two", "3")
    assert found.notes == (f"not used: 1 row of 'table{ending}' without a recording",)
    with pytest.raises(
        DataError,
        match=r"a column 'sentence' \(`d2v.data.label_field`\), but has '(id|path)', '(path|text)', '(text|id)'",
    ):
        table_labels(path, str(tmp_path), NAMES, ("path", "sentence"))
    with pytest.raises(DataError, match=r"must name recordings, but none of the 4 rows does. They name 'a/one'"):
        table_labels(path, "/elsewhere", ["y.wav"], FIELDS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.tsv", "path\ttext\na/one.flac\tx\na/one\ty\n", "line 3 of .* gives 'a/one.flac' a second label"),
        ("t.tsv", "path\ttext\na/one.flac\n", "line 2 of .* must hold 2 columns or more, .* but holds 1"),
        ("t.jsonl", "{\n", "line 1 of .* is not valid JSON"),
        ("t.jsonl", "[1]\n", "line 1 of .* must have a column 'path'"),
        ("t.jsonl", '{"path": "a", "text": ["x"]}\n', r"must hold a string in 'text', but holds \['x'\]"),
        ("t.csv", "", r"must be a table \(.tsv or .jsonl\)"),
    ],
)
def test_bad_tables(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        table_labels(write(tmp_path / name, text), str(tmp_path), NAMES, FIELDS)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        table_labels(str(tmp_path / "none.tsv"), str(tmp_path), NAMES, FIELDS)
    (tmp_path / "t.tsv").write_bytes(b"path\ttext\n\xff\tx\n")
    with pytest.raises(DataError, match=r"line 2 of .* must be UTF-8 text, but is not. Save the file as UTF-8"):
        table_labels(str(tmp_path / "t.tsv"), str(tmp_path), NAMES, FIELDS)


def test_a_second_transcript_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = write(tmp_path / "a" / "a.trans.txt", "one x\none x\n")
    assert librispeech_labels(str(tmp_path), NAMES[:2]).texts == ("x", None)
    write(Path(path), "one x\ntwo y\none z\n")
    with pytest.raises(DataError, match=r"line 3 of '.*a.trans.txt' gives 'one' a second label"):
        librispeech_labels(str(tmp_path), NAMES[:2])


def test_folders_are_classes() -> None:
    assert folder_labels([*NAMES, "loose.wav"]).texts == ("a", "a", "b", None)


def test_vocabulary_of_transcripts() -> None:
    vocabulary = vocabulary_of(["no on", "né"])
    assert vocabulary.tokens == ("<pad>", "|", "n", "o", "é")
    classes = vocabulary.encode("no  on")
    assert classes == [2, 3, 1, 3, 2, 1]
    assert vocabulary.outside("on to cat") == {"t": 2, "c": 1, "a": 1}
    # without a class for it, a character is left out, and a word without any other vanishes
    assert vocabulary.encode("tn x o") == [2, 1, 3, 1]
    assert Vocabulary(("<pad>", "|", "<unk>", "n")).encode("tn") == [2, 3, 1]
    # equal letters need a blank between them
    assert vocabulary.decode([0, 2, 2, 0, 2, 3, 1, 1, 0, 4, 1, 0]) == "nno é"
    assert normalized_text("  Caf\u0065\u0301\tA|b ", "lower") == "caf\u00e9 a b"


def test_vocabularies_of_files(tmp_path: Path) -> None:
    fairseq = read_vocabulary(write(tmp_path / "dict.ltr.txt", "| 94802\nE 51860\n"))
    assert fairseq.tokens == ("<pad>", "<s>", "</s>", "<unk>", "|", "E")
    assert fairseq.blank == 0
    lines = read_vocabulary(write(tmp_path / "letters.txt", "a\n'\n\nb\n"))
    assert lines.tokens == ("<pad>", "|", "a", "'", "b")
    theirs = read_vocabulary(write(tmp_path / "vocab.json", '{"a": 0, "|": 1, "<pad>": 3, "[UNK]": 2}'))
    assert theirs.tokens == ("a", "|", "[UNK]", "<pad>")
    assert theirs.blank == 3
    assert theirs.decode([0, 2, 3, 0]) == "aa"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("v.txt", "a\nbc\n", "'bc' is not a single character"),
        ("v.txt", "a\na\n", "'a' is in it twice"),
        ("v.txt", "", "it holds no letter"),
        ("v.json", '{"a": 0, "|": 1}', "it lacks '<pad>', the blank"),
        ("v.json", '{"a": 0, "<pad>": 1}', r"it lacks '\|', the end of a word"),
        ("v.json", '{"a": 1, "<pad>": 2, "|": 3}', "it must map each letter to a class, 0 to"),
        ("v.json", "[]", "it must map each letter"),
        ("v.json", "{", "not valid JSON"),
    ],
)
def test_bad_vocabularies(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"`d2v.data.vocabulary` must be a file of letters, but .* is not: {message}"):
        read_vocabulary(write(tmp_path / name, text))


def distance(a: list[str], b: list[str]) -> int:
    """Levenshtein's distance by its recursion."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, old = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(old[j] + 1, row[-1] + 1, old[j - 1] + (x != y)))
    return row[-1]


def test_error_rates() -> None:
    one = count_errors([("the cat  sat", "the cat sat down")])
    assert (one.word_errors, one.words, one.letter_errors, one.letters) == (1, 3, 5, 11)
    assert (one.wer, one.cer) == (1 / 3, 5 / 11)
    chance = random.Random(0)
    texts = ["".join(chance.choices("ab ", k=chance.randrange(12))) for _ in range(200)]
    pairs = list(zip(texts[:100], texts[100:], strict=True))
    found = count_errors(pairs)
    assert found.word_errors == sum(distance(a.split(), b.split()) for a, b in pairs)
    spaced = [(" ".join(a.split()), " ".join(b.split())) for a, b in pairs]
    assert found.letter_errors == sum(distance(list(a), list(b)) for a, b in spaced)
    assert count_errors([]).wer == 0.0


ARPA = """\\data\\
ngram 1=6
ngram 2=4

\\1-grams:
-1.0\t<unk>
-99\t<s>\t-0.3
-1.0\t</s>
-0.8\tcat\t-0.3
-0.8\tcab\t-0.3
-0.5\tsat\t-0.3

\\2-grams:
-0.1\t<s> cat
-2.0\t<s> cab
-0.1\tcat sat
-0.2\tsat </s>

\\end\\
"""


def heard(vocabulary: Vocabulary) -> torch.Tensor:
    """Log-probabilities `[1, T, V]` of "cab sat" in which the letter before the space may also be a t."""
    classes = [label for letter in vocabulary.encode("cab sat") for label in (letter, vocabulary.blank)]
    logits = torch.full((1, len(classes) + 3, len(vocabulary.tokens)), -8.0)
    logits[0, range(len(classes)), classes] = 0.0
    logits[0, 4, vocabulary.tokens.index("t")] = -0.2
    # padding that would read as a letter
    logits[0, len(classes) :, 2] = 0.0
    return logits.log_softmax(-1)


def test_greedy_decoding() -> None:
    vocabulary = vocabulary_of(["cat cab sat"])
    log_probs = heard(vocabulary)
    assert greedy_transcripts(vocabulary)(log_probs, [log_probs.shape[1] - 3]) == ["cab sat"]
    assert greedy_transcripts(vocabulary)(log_probs, [0]) == [""]


def test_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model knows that the cat sat."""
    vocabulary = vocabulary_of(["cat cab sat"])
    log_probs = heard(vocabulary)
    lengths = [log_probs.shape[1] - 3]
    model = write(tmp_path / "lm.arpa", ARPA)
    if find_spec("flashlight") is None:
        with pytest.raises(MissingPackageError, match=r"`pip install 'd2v_fast\[lm\]'` installs it"):
            beam_decoder(vocabulary, Beam(model))
        pytest.skip("flashlight-text is not installed")
    assert beam_decoder(vocabulary, Beam(model))(log_probs, lengths) == ["cat sat"]
    assert beam_decoder(vocabulary, Beam(model, weight=0.0))(log_probs, lengths) == ["cab sat"]
    words = write(tmp_path / "words.txt", "cab\tc a b |\nsat\ts a t |\n")
    assert beam_decoder(vocabulary, Beam(model, words))(log_probs, lengths) == ["cab sat"]
    with pytest.raises(DataError, match="must be spelled in the letters of the run, but none of the 3 is"):
        beam_decoder(vocabulary_of(["xyz"]), Beam(model))
    with pytest.raises(DataError, match="`--lexicon` must name a file of words"):
        beam_decoder(vocabulary, Beam(write(tmp_path / "lm.bin", "no model")))
    with pytest.raises(DataError, match="must be ARPA text or a binary file of KenLM, which cannot read it: "):
        beam_decoder(vocabulary, Beam(write(tmp_path / "lm.bin", "no model"), words))
    capsys.readouterr()
    beam_decoder(vocabulary_of(["sat cat"]), Beam(model))
    assert capsys.readouterr().err == "1 of 3 words have letters that the run lacks and are left out\n"


def test_replacement_keeps_its_label(tmp_path: Path) -> None:
    for number, seconds in enumerate((0.6, 1.0, 0.8)):
        soundfile.write(tmp_path / f"{number}.flac", tone(seconds, 300 + 100 * number), RATE)
    dataset = make_dataset(tmp_path)
    content = (tmp_path / "1.flac").read_bytes()
    (tmp_path / "1.flac").write_bytes(content[:200] + bytes(len(content) - 200))
    waves, read, bad = dataset.read_labeled(np.array([0, 1]), np.zeros(2))
    assert read.tolist() == [0, 2]
    assert [len(wave) for wave in waves] == [round(0.6 * RATE), round(0.8 * RATE)]
    assert len(bad) == 1
    assert "1.flac" in bad[0]
    torch.testing.assert_close(waves[1], dataset.whole(2))
    assert dataset.only(np.array([2, 0])).names() == ["2.flac", "0.flac"]
