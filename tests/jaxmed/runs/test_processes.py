"""Which of several processes this is: by flags, by what launchers say, or the only one."""

import pytest

from jaxmed.runs import processes
from jaxmed.runs.processes import Process
from models.errors import InputError

SLURM = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "1"}
TPU = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "host-a,host-b"}


@pytest.mark.parametrize(
    ("flags", "environment", "found"),
    [
        ((None, None), {}, Process(0, 1)),
        ((1, 3), {}, Process(1, 3)),
        ((None, None), SLURM, Process(2, 4)),
        ((0, 2), SLURM, Process(0, 2)),
        # In a job, but of no task of it.
        ((None, None), {"SLURM_NTASKS": "4"}, Process(0, 1)),
        ((None, None), TPU, Process(1, 2)),
        ((None, None), {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, Process(0, 1)),
        # Kubernetes says which, and not of how many.
        ((None, 2), KUBERNETES, Process(1, 2)),
        ((None, None), KUBERNETES | {processes.COUNT: "5"}, Process(1, 5)),
        ((None, None), KUBERNETES, Process(0, 1)),
        ((None, None), KUBERNETES | TPU, Process(1, 2)),
        ((None, 1), SLURM, Process(0, 1)),
    ],
)
def test_flags_come_before_what_the_launcher_says(flags, environment, found):
    assert processes.this(*flags, environment) == found


@pytest.mark.parametrize(
    ("flags", "environment", "said"),
    [
        ((2, None), {}, "--process=2 needs --processes=N"),
        ((None, 3), {}, "--processes=3 needs --process=K, from 0 to 2"),
        ((3, 3), {}, "process 3 of 3: they count from 0 to 2"),
        ((None, 2), SLURM, "process 2 of 2: .* the environment does"),
        ((None, None), SLURM | {"SLURM_PROCID": "x"}, "SLURM_PROCID=x in the environment"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(flags, environment, said):
    with pytest.raises(InputError, match=said):
        processes.this(*flags, environment)
