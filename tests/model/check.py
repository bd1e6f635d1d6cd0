"""Has SPIN prove the models in this folder, and see that they fail without each rule that they are about.

Usage: check.py [DIRECTORY], where it works; needs `spin` and `gcc`.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import tempfile
from pathlib import Path

_HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Claim:
    """`rules`: names that switch rules of the model off. `liveness`: the model's LTL formula, under weak fairness,
    instead of its assertions."""

    model: str
    rules: tuple[str, ...] = ()
    liveness: bool = False
    holds: bool = True

    @property
    def name(self) -> str:
        what = "every lease ends" if self.liveness else "nothing wrong is accepted"
        return f"{self.model}: {what}" + "".join(f", {rule}" for rule in self.rules)


CLAIMS = (
    Claim("peer_read"),
    Claim("peer_read", liveness=True),
    # A slot that is recycled under a lease costs a read, never a wrong block.
    Claim("peer_read", ("NO_PIN",)),
    Claim("peer_read", ("NEVER_ACCEPTED",), holds=False),
    Claim("peer_read", ("NO_GENERATION_CHECK",), holds=False),
    Claim("peer_read", ("LATE_GENERATION",), holds=False),
    Claim("peer_read", ("NO_INCARNATION",), holds=False),
    Claim("peer_read", ("NO_EXPIRY",), liveness=True, holds=False),
    # The word of the lease instead of the slot's generation: right as long as the lease keeps its slot.
    Claim("peer_read", ("LEASE_WORDS",)),
    Claim("peer_read", ("LEASE_WORDS",), liveness=True),
    Claim("peer_read", ("LEASE_WORDS", "NEVER_ACCEPTED"), holds=False),
    Claim("peer_read", ("LEASE_WORDS", "NO_PIN"), holds=False),
    Claim("peer_read", ("LEASE_WORDS", "LATE_WORD"), holds=False),
    Claim("peer_read", ("LEASE_WORDS", "NO_GENERATION_CHECK"), holds=False),
    Claim("peer_read", ("LEASE_WORDS", "NO_INCARNATION"), holds=False),
)


def verify(claim: Claim, directory: Path) -> tuple[int, int]:
    """Errors found, states visited. Raises RuntimeError when SPIN did not finish its search."""
    definitions = [f"-D{rule}" for rule in claim.rules]
    _run(["spin", *definitions, "-a", str(_HERE / f"{claim.model}.pml")], directory)
    kind = ["-DNFAIR=4"] if claim.liveness else ["-DSAFETY", "-DNOCLAIM"]
    _run(["gcc", "-O2", "-w", "-DVECTORSZ=4096", *kind, "-o", "pan", "pan.c"], directory)
    search = ["-a", "-f"] if claim.liveness else []
    output = _run(["./pan", "-m1000000", "-w24", *search], directory)
    errors = re.search(r"errors: (\d+)", output)
    states = re.search(r"(\d+) states, stored", output)
    if not errors or not states or "search depth too small" in output:
        raise RuntimeError(f"{claim.name}: no verdict\n{output}")
    return int(errors[1]), int(states[1])


def _run(argv: list[str], directory: Path) -> str:
    result = subprocess.run(argv, cwd=directory, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: exit code {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout


def main(directory: Path) -> int:
    wrong = 0
    for claim in CLAIMS:
        errors, states = verify(claim, directory)
        as_expected = (errors == 0) == claim.holds
        wrong += not as_expected
        verdict = "holds" if errors == 0 else "fails"
        print(f"{'ok   ' if as_expected else 'WRONG'} {claim.name}: {verdict} ({states} states)")
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1])))
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(main(Path(scratch)))
