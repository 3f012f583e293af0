"""Make the sample set `speech` with `python -m tests.make_speech_samples`; `--check` compares it with the bundled one.

This requires eSpeak NG (Debian package `espeak-ng`). One version always gives the same output, so `--check` requires
equal lengths, and samples equal up to the rounding of the resampler.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import soxr

FOLDER = Path(__file__).resolve().parent.parent / "d2v_fast" / "modalities" / "speech" / "speech_samples"
RATE = 16_000
DIGITS = "zero one two three four five six seven eight nine"
OTHERS = (
    "yes no stop left right up down open music water window yellow garden morning river paper orange finger fish bird"
)
WORDS = [*DIGITS.split(), *OTHERS.split()]
# eSpeak's language and variant, words per minute, pitch (0 to 99)
VOICES = {
    "en-us+m1": (130, 45),
    "en-us+f2": (140, 55),
    "en-us+m7": (150, 35),
    "en-gb+m3": (125, 50),
    "en-gb+f1": (145, 60),
    "en-gb-scotland+m4": (135, 40),
    "en-gb-scotland+f3": (130, 50),
    "en-gb-x-rp+m5": (140, 30),
    "en-gb-x-gbclan+f4": (135, 65),
    "en-029+m2": (125, 55),
    "en-us+f5": (135, 45),
    "en-gb+m6": (140, 40),
    "en-gb-x-gbcwmd+f1": (130, 40),
    "en-029+m3": (145, 60),
}
# share of full scale; softer samples take fewer bits, and training normalizes every waveform
PEAK = 0.1
# trim where samples stay below this share of the peak, and leave this margin in seconds on both sides
EDGE, MARGIN_S = 0.02, 0.02
HEADER = "path\tword\tvoice\tspeed\tsamples\n"


def spoken(word: str, voice: str) -> np.ndarray:
    """Synthesize a word, int16 at 16 kHz, without the silence around it."""
    speed, pitch = VOICES[voice]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/a.wav"
        command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", path, word]
        subprocess.run(command, check=True)
        samples, rate = soundfile.read(path, dtype="float64")
    samples = soxr.resample(samples, rate, RATE, quality="VHQ")
    loud = np.flatnonzero(np.abs(samples) > EDGE * np.abs(samples).max())
    margin = round(MARGIN_S * RATE)
    samples = samples[max(0, loud[0] - margin) : loud[-1] + margin]
    return np.round(samples * (PEAK * 2**15 / np.abs(samples).max())).astype(np.int16)


def made() -> dict[str, tuple[str, np.ndarray]]:
    """Return the line of the index and the samples of every recording, by path."""
    found = {}
    for voice in VOICES:
        for word in WORDS:
            samples = spoken(word, voice)
            path = f"{voice}/{word}.flac"
            found[path] = (f"{path}\t{word}\t{voice}\t{VOICES[voice][0]}\t{len(samples)}\n", samples)
    return found


def write(folder: Path) -> None:
    recordings = made()
    for path, (_, samples) in recordings.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / path, samples, RATE, subtype="PCM_16", compression_level=1.0)
    index = HEADER + "".join(line for line, _ in recordings.values())
    (folder / "index.tsv").write_text(index, encoding="utf-8")


def differences(folder: Path) -> list[str]:
    """Return the differences between a folder and newly made recordings."""
    recordings = made()
    found = []
    if (folder / "index.tsv").read_text(encoding="utf-8") != HEADER + "".join(line for line, _ in recordings.values()):
        found.append("index.tsv differs")
    for path, (_, expected) in recordings.items():
        samples, rate = soundfile.read(folder / path, dtype="int16")
        if rate != RATE or samples.shape != expected.shape:
            found.append(f"{path}: {len(samples)} samples at {rate} Hz instead of {len(expected)}")
        elif np.abs(samples.astype(int) - expected).max() > 2:
            found.append(f"{path}: samples differ")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args()
    if not options.check:
        write(options.folder)
        return 0
    found = differences(options.folder)
    print("\n".join(found) or "as it is made")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
