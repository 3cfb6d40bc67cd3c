"""Fill a page of measurements anew: `python -m refllm.evaluate.page docs/benchmarks.md [WORD ...]`, from a clone.

docs/benchmarks.md and the pages under docs/results are made so. A page shows commands with what they print. Every
command is run again, or those that hold all of the words, and its output takes the place of the old one. A run that
other work has disturbed is refused: the page keeps what it had.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from refllm.formats.files import atomic_write
from refllm.formats.process import child_environment

_BLOCK = re.compile(r"(```console\n\$ refllm ((?:bench|compare) [^\n]*)\n)(.*?)(```)", re.DOTALL)
ATTEMPTS = 3


def commands(text: str) -> list[str]:
    """The bench and compare commands of a page.

    Examples
    --------
    >>> commands("```console\\n$ refllm bench decode --threads 2\\n```")
    ['bench decode --threads 2']
    """
    return [block[1] for block in _BLOCK.findall(text)]


def renew(text: str, command: str, output: str) -> str:
    """The page with this output of this command.

    Examples
    --------
    >>> page = "```console\\n$ refllm bench decode\\nold\\n```"
    >>> print(renew(page, "bench decode", "new"))
    ```console
    $ refllm bench decode
    new
    ```
    """
    fill = lambda found: found[1] + output.rstrip("\n") + "\n" + found[4] if found[2] == command else found[0]
    return _BLOCK.sub(fill, text)


def run_quietly(command: str) -> str:
    """Run a command until nothing disturbed it, three times at most.

    Raises
    ------
    RuntimeError
        It failed, or was disturbed each time.
    """
    words = shlex.split(command)
    if "--plot" in words:
        Path(words[words.index("--plot") + 1]).parent.mkdir(parents=True, exist_ok=True)
    for _ in range(ATTEMPTS):
        print(f"$ refllm {command}", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, "-m", "refllm", *words],
            capture_output=True,
            text=True,
            encoding="utf-8",
            env=child_environment(),
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"refllm {command}: {done.stderr.strip() or done.returncode}")
        if "repeat it on a quiet machine" not in done.stderr:
            return done.stdout
        print(done.stderr.splitlines()[0], file=sys.stderr)
    raise RuntimeError(f"refllm {command}: disturbed by other work {ATTEMPTS} times")


def main(argv: list[str]) -> None:
    """Renew the file named first; it is written after each command, so that what was measured is kept."""
    if not argv:
        sys.exit("usage: python -m refllm.evaluate.page FILE.md [WORD ...]")
    path, words = Path(argv[0]), argv[1:]
    for command in commands(path.read_text("utf-8")):
        if all(word in command.split() for word in words):
            output = run_quietly(command)
            text = renew(path.read_text("utf-8"), command, output)
            with atomic_write(path, "w") as file:
                file.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
