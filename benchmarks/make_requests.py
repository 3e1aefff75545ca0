#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Makes requests with lengths like those of conversations, for serve_compare.py.

    python benchmarks/make_requests.py CHECKPOINT requests.json --count 512

Lengths of prompts and completions are log-normal, as in logs of chats: most are short,
a few are long. The defaults have a median prompt of 110 tokens and a median completion
of 130, both with a deviation of 1 in the logarithm, cut at 4 and 1024. They are chosen,
not fitted to a data set. Prompts are pieces of the Python standard library, which is on
every machine and repeats itself as code does (for n-gram drafts). The file has the form
of ShareGPT's, which vllm bench serve reads; only the length of the replies in it
matters. The same arguments give the same file.
"""

import argparse
import json
import random
import sys
import sysconfig
from pathlib import Path
from typing import Any

SHORTEST = 4
SOURCES = (
    "argparse.py",
    "ast.py",
    "inspect.py",
    "shutil.py",
    "tarfile.py",
    "typing.py",
)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", help="its tokenizer counts the tokens")
    add("file", type=Path, help="to write")
    add("--count", type=int, default=512, help="requests (default 512)")
    add("--seed", type=int, default=0)
    add("--input-median", type=float, default=110, help="tokens (default 110)")
    add("--output-median", type=float, default=130, help="tokens (default 130)")
    add("--spread", type=float, default=1.0, help="deviation of the logarithm")
    add("--longest", type=int, default=1024, help="most tokens of each (default 1024)")
    options = parser.parse_args(arguments)
    if options.count < 1 or options.longest < SHORTEST:
        parser.error(f"--count is at least 1, --longest at least {SHORTEST}")
    return options


def length(generator: random.Random, median: float, options: Any) -> int:
    """A length in tokens."""
    drawn = median * generator.lognormvariate(0, options.spread)
    return min(max(round(drawn), SHORTEST), options.longest)


def requests(tokenizer: Any, text: str, options: Any) -> list[dict[str, Any]]:
    """The requests: pieces of ``text``, each with what follows as its reply.

    Pieces are cut by tokens; encoded again they may count a few more or less.
    """
    generator = random.Random(options.seed)
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    found = []
    for _ in range(options.count):
        size = length(generator, options.input_median, options)
        more = length(generator, options.output_median, options)
        start = generator.randrange(len(tokens) - size - more)
        middle = start + size
        prompt = tokenizer.decode(tokens[start:middle])
        reply = tokenizer.decode(tokens[middle : middle + more])
        found.append(
            {
                "conversations": [
                    {"from": "human", "value": prompt},
                    {"from": "gpt", "value": reply},
                ],
                "input_tokens": len(tokenizer(prompt).input_ids),
                "output_tokens": len(tokenizer(reply).input_ids),
            }
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Write the file; returns the exit status."""
    options = parse_arguments(arguments)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    library = Path(sysconfig.get_paths()["stdlib"])
    text = "\n".join((library / name).read_text() for name in SOURCES)
    rows = requests(tokenizer, text, options)
    options.file.write_text(json.dumps(rows, indent=1) + "\n")
    for key in ("input_tokens", "output_tokens"):
        values = sorted(row[key] for row in rows)
        print(
            f"{key}: mean {sum(values) / len(values):.0f}, median "
            f"{values[len(values) // 2]}, longest {values[-1]}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
