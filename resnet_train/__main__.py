"""`python -m resnet_train COMMAND …`: the commands, if their scripts are not on the path."""

from __future__ import annotations

import sys

from resnet_train import cli
from resnet_train.console import fail
from resnet_train.errors import UserError, nearest
from resnet_train.terminal import say

COMMANDS = {
    "train": cli.train,
    "eval": cli.evaluate,
    "classify": cli.classify,
    "features": cli.features,
    "report": cli.report,
    "responses": cli.responses,
    "weights": cli.weights,
    "pack": cli.pack,
    "detect": cli.detect,
    "localize": cli.localize,
    "bench": cli.bench,
}


def main() -> None:
    """Run the command that the first word names; without one, as in `python -m resnet_train depth=20`, train."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help", "list"):
        say(f"python -m resnet_train COMMAND …, or resnet-COMMAND …; of each --help shows more: {', '.join(COMMANDS)}")
        return
    name = words[0] if words[0] in COMMANDS else "train"
    if name != words[0] and "=" not in words[0] and not words[0].startswith("-"):
        fail(UserError(f"{words[0]}: is no command; there are {', '.join(COMMANDS)}{nearest(words[0], COMMANDS)}"))
    COMMANDS[name](words=words[1:] if name == words[0] else words)


if __name__ == "__main__":
    main()
