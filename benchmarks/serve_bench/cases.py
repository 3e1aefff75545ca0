# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The cases to compare: server variants, modes and load points, from the arguments."""

import json
import re
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path

SWITCH = "VLLM_HYBRID_W4A16_MOE"

# name: (environment, vllm serve arguments)
PRESETS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "hybrid": ({SWITCH: "require"}, ()),
    "stock": ({SWITCH: "0"}, ()),
    "triton": ({SWITCH: "0"}, ("--moe-backend", "triton")),
    "marlin": ({SWITCH: "0"}, ("--moe-backend", "marlin")),
}
# hybrid with its lm_head quantized at load: hybrid-int4_rescored and so on
for _name in ("int8_g32", "int4_g32", "int4_g128", "int4_rescored"):
    _targets = f'{{"targets": {{"lm_head": "{_name}"}}}}'
    PRESETS[f"hybrid-{_name}"] = (
        {SWITCH: "require"},
        ("--quantization-config", _targets),
    )
MODES = {"eager": ("--enforce-eager",), "compiled": ()}
_ASSIGNMENT = re.compile(r"([A-Z_][A-Z0-9_]*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Variant:
    """One way to serve: a checkpoint, arguments and environment."""

    name: str
    model: str
    arguments: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class Point:
    """One load: tokens per prompt and completion, concurrent requests."""

    input_len: int
    output_len: int
    concurrency: int
    from_file: bool = False  # prompts of --requests; the lengths are means

    def __str__(self) -> str:
        return f"{self.input_len}/{self.output_len} x{self.concurrency}"


def parse_variant(text: str, model: str | None) -> Variant:
    """``NAME`` of a preset, or ``NAME=words``.

    Words are split as in a shell: ``VAR=value`` sets the environment, ``--model X``
    another checkpoint, everything else goes to ``vllm serve``. After the name of a
    preset they add to the preset. Raises ``ValueError``.
    """
    name, equals, rest = text.partition("=")
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ValueError(f"--variant {text!r}: {name!r} is not a name")
    if name not in PRESETS and not equals:
        raise ValueError(
            f"--variant {text!r} is neither a preset ({', '.join(PRESETS)}) nor "
            "NAME=words"
        )
    preset_environment, preset_arguments = PRESETS.get(name, ({}, ()))
    environment, arguments = dict(preset_environment), list(preset_arguments)
    words = shlex.split(rest)
    while words:
        word = words.pop(0)
        found = _ASSIGNMENT.fullmatch(word)
        if found:
            environment[found[1]] = found[2]
        elif word == "--model":
            if not words:
                raise ValueError(f"--variant {text!r}: --model needs a checkpoint")
            model = words.pop(0)
        elif word.startswith("--model="):
            model = word.partition("=")[2]
        else:
            arguments.append(word)
    if model is None:
        raise ValueError(f"--variant {text!r}: no checkpoint, give one or --model")
    return Variant(name, model, tuple(arguments), environment)


def parse_points(
    lengths: str, concurrency: str, requests: Path | None = None
) -> list[Point]:
    """Parse ``100:128,2048:8@1`` and ``1,4``.

    Every length is taken at every concurrency, one with ``@N`` at N alone. With
    ``requests``, a file of make_requests.py, its requests come last, at every
    concurrency. Raises ``ValueError``.
    """
    counts = concurrency.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise ValueError(f"--concurrency: {concurrency!r} is not a list of counts")
    points = []
    for text in lengths.split(",") if lengths else ():
        found = re.fullmatch(r"(\d+):(\d+)(?:@(\d+))?", text)
        if not found or not all(int(number or 1) for number in found.groups()):
            raise ValueError(f"--lengths: {text!r} is not INPUT:OUTPUT[@N] tokens")
        for count in [found[3]] if found[3] else counts:
            points.append(Point(int(found[1]), int(found[2]), int(count)))
    if requests is not None:
        means = mean_lengths(requests)
        points += [Point(*means, int(count), from_file=True) for count in counts]
    return points


def mean_lengths(requests: Path) -> tuple[int, int]:
    """The mean prompt and completion of a file of make_requests.py, in tokens.

    Raises ``ValueError`` if it is no such file.
    """
    try:
        rows = json.loads(requests.read_text())
        sizes = [(row["input_tokens"], row["output_tokens"]) for row in rows]
        prompt, completion = zip(*sizes, strict=True)
        return round(statistics.mean(prompt)), round(statistics.mean(completion))
    except OSError as error:
        raise ValueError(f"--requests {requests}: {error.strerror}") from None
    except (LookupError, TypeError, ValueError):
        raise ValueError(
            f"--requests {requests}: expected a JSON list of requests with "
            "input_tokens and output_tokens (make_requests.py writes it)"
        ) from None


def parse_image(text: str) -> tuple[int, int]:
    """Parse ``640x480`` as width and height. Raises ``ValueError``."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or not int(found[1]) or not int(found[2]):
        raise ValueError(f"--image: {text!r} is not WIDTHxHEIGHT in pixels")
    return int(found[1]), int(found[2])


def check_checkpoint(model: str) -> None:
    """Raise ``ValueError`` unless ``model`` can be a checkpoint.

    That is a folder with a config.json, or a name of the form OWNER/NAME, which is not
    looked up on the Hub.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"checkpoint {model}: no config.json in this folder")
    elif folder.exists():
        raise ValueError(f"checkpoint {model}: expected a folder, got a file")
    elif not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        raise ValueError(
            f"checkpoint {model}: there is no such folder, and it is not a hub name "
            "(OWNER/NAME)"
        )
