"""The kill matrix: which cases kill which mutant of the museum, and what the doctor says."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from refllm.evaluate.golden.doctor import Diagnosis, Memory, diagnose
from refllm.evaluate.golden.museum import MUTANTS
from refllm.evaluate.golden.museum.exhibit import Mutant
from refllm.evaluate.golden.runner import python_call
from refllm.evaluate.golden.suite import Suite


@dataclass(frozen=True)
class Row:
    """A mutant and what became of it."""

    mutant: Mutant
    diagnosis: Diagnosis

    @property
    def killed(self) -> bool:
        """Whether a case fails."""
        return self.diagnosis.failed > 0

    @property
    def named(self) -> bool:
        """Whether the doctor names the right mistake first, or level with the first."""
        return bool(self.diagnosis.names & set(self.mutant.mistakes))


def examine(mutant: Mutant, suites: Mapping[str, Suite], memory: Memory | None = None) -> Row:
    """Run a mutant on its suite and ask the doctor.

    Parameters
    ----------
    mutant : Mutant
    suites : mapping of name to Suite
    memory : Memory, optional
        Shared between mutants of one suite that declare nothing.
    """
    options = {"declared": mutant.declared, "outputs": set(mutant.outputs) or None}
    memory = None if mutant.declared else memory
    call = python_call(mutant.answer)
    (found,) = diagnose([suites[mutant.suite]], call, memory=memory, **options)
    return Row(mutant, found)


def kill_matrix(suites: Iterable[Suite], mutants: Iterable[Mutant] | None = None) -> Iterator[Row]:
    """One row for every mutant whose suite is there, in the order of the museum."""
    by_name = {suite.name: suite for suite in suites}
    memory = Memory()
    for mutant in MUTANTS.values() if mutants is None else mutants:
        if mutant.suite in by_name:
            yield examine(mutant, by_name, memory)


def matrix_text(rows: list[Row]) -> str:
    """A table for people: killed by how many cases of those that ran, and what the doctor says."""
    lines = [f"{'mutant':31} {'suite':28} {'killed by':>9}  doctor"]
    for row in rows:
        found = row.diagnosis
        cases = f"{found.failed}/{found.failed + found.passed}"
        names = " or ".join(sorted(found.names)) or "nothing"
        verdict = names if row.named else f"{names}  WRONG, it is {' or '.join(row.mutant.mistakes)}"
        lines.append(
            f"{row.mutant.name:31} {row.mutant.suite:28} {cases:>9}  {verdict if row.killed else 'NOT KILLED'}"
        )
    killed, named = sum(row.killed for row in rows), sum(row.named for row in rows)
    share = f" ({100 * named / len(rows):.0f} %)" if rows else ""
    return "\n".join([*lines, f"{len(rows)} mutants: {killed} killed, {named} named by the doctor{share}"])


def matrix_json(rows: list[Row]) -> list[dict]:
    """The same for programs."""
    return [
        {
            "mutant": row.mutant.name,
            "suite": row.mutant.suite,
            "year": row.mutant.year,
            "links": row.mutant.links,
            "story": row.mutant.story,
            "failed": row.diagnosis.failed,
            "passed": row.diagnosis.passed,
            "expected": row.mutant.mistakes,
            "named": sorted(row.diagnosis.names),
            "killed": row.killed,
            "right": row.named,
        }
        for row in rows
    ]
