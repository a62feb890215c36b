"""Slurm and Open MPI by the variables that srun and mpirun set; neither is here."""
import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

from configs import base
from mmaudio_jax import distributed

_FIRST_PORT = 65535 - 4096 + 1  # of JAX's ports for their jobs

_JOINED = """
from configs import base
from mmaudio_jax import checkpoints
from mmaudio_jax import distributed
from mmaudio_jax import partitioning
with distributed.joined(base.get_config().hosts, alone=False):
    import jax
    print(f'<{jax.process_index()} of {jax.process_count()}>', flush=True)
"""


@pytest.mark.parametrize('launcher', ['slurm', 'open_mpi'])
def test_processes_of_a_launcher_find_each_other(launcher):
    """By the variables that srun and mpirun set; neither is here."""
    job = next(job for job in range(4096) if _is_free(_FIRST_PORT + job))  # JAX makes the port of the job's number
    processes = []
    for index in range(2):
        variables = {
            'slurm': {'SLURM_JOB_ID': job, 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': 2, 'SLURM_PROCID': index,
                      'SLURM_LOCALID': index},
            'open_mpi': {'OMPI_MCA_orte_hnp_uri': f'{job << 12}.0;tcp://127.0.0.1:1', 'OMPI_COMM_WORLD_SIZE': 2,
                         'OMPI_COMM_WORLD_RANK': index, 'OMPI_COMM_WORLD_LOCAL_RANK': index},
        }[launcher]
        processes.append(subprocess.Popen([sys.executable, '-c', _JOINED], cwd=pathlib.Path(__file__).parents[1],
                                          env=os.environ | {name: str(value) for name, value in variables.items()},
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    told = [process.communicate(timeout=120)[0] for process in processes]
    for index, text in enumerate(told):
        assert processes[index].returncode == 0 and f'<{index} of 2>' in text, text


@pytest.mark.parametrize('variables', [{'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '1',
                                        'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'},
                                       {'OMPI_MCA_orte_hnp_uri': '1.0;tcp://127.0.0.1:1', 'OMPI_COMM_WORLD_SIZE': '1',
                                        'OMPI_COMM_WORLD_RANK': '0', 'OMPI_COMM_WORLD_LOCAL_RANK': '0'}])
def test_the_only_process_of_a_launcher_joins_nothing_and_keeps_all_devices(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **_: pytest.fail('would see one GPU'))
    with distributed.joined(base.get_config().hosts, alone=False):
        assert jax.process_count() == 1


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(('127.0.0.1', port)) != 0
