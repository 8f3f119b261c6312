"""One of the processes that do a run together, in many small units of work that take a while:

python -m tests.jaxmed.runs.sharing SECONDS --process=0 --processes=2 --model=... (any setting)
"""

import sys
import time

from jaxmed.engine import cost, scan
from jaxmed.files import places
from launch import mediate

# A block has two pairs at most, and a layer's neurons fill a chunk.
SIZES = {"_PAIRS": {"cpu": 2}, "_TOGETHER": {"cpu": 2}, "UNITS_OF_A_BLOCK": 12}


def slow(seconds: float) -> None:
    """Has every block take so much longer."""
    effects = scan.Scan.effects

    def slowed(self, block, *arguments):
        time.sleep(seconds)
        return effects(self, block, *arguments)

    scan.Scan.effects = slowed


if __name__ == "__main__":
    slow(float(sys.argv.pop(1)))
    for name, value in SIZES.items():
        setattr(cost, name, value)
    places.RETRIES.update(initial_delay="10ms", max_delay="50ms")
    mediate.main()
