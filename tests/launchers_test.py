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


_OPEN_MPI_5 = {'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_RANK': '2', 'OMPI_COMM_WORLD_LOCAL_RANK': '2'}
_BATCH_SCRIPT = {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'}  # no step's


def _joined_with(variables: dict[str, str]) -> tuple[int, str]:
    """Exit code and output of a process that finds these variables of a launcher."""
    result = subprocess.run([sys.executable, '-c', _JOINED], cwd=pathlib.Path(__file__).parents[1], env=os.environ | variables,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return result.returncode, result.stdout


@pytest.mark.parametrize('variables, index', [
    (_OPEN_MPI_5, 'OMPI_COMM_WORLD_RANK'),
    (_BATCH_SCRIPT | _OPEN_MPI_5, 'OMPI_COMM_WORLD_RANK'),
    ({'SLURM_STEP_NUM_TASKS': '4', 'SLURM_PROCID': '1'}, 'SLURM_PROCID'),  # the rest was lost on the way, as in some containers
])
def test_processes_that_do_not_find_each_other_do_not_start(variables, index):
    """Each would train alone, and all but one then fail at the folder that the first one holds."""
    code, told = _joined_with(variables)
    assert code and 'says that 4 processes were started, but JAX cannot tell where they meet' in told, told
    assert f'JAX_COORDINATOR_ADDRESS=HOST:PORT of process 0, JAX_NUM_PROCESSES=4 and JAX_PROCESS_ID=${index} for each' in told


@pytest.mark.parametrize('variables', [
    _BATCH_SCRIPT, {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4'}, _BATCH_SCRIPT | {'SLURM_STEP_NUM_TASKS': '1'}, {},
])
def test_one_process_within_a_job_of_several_tasks_works_alone(variables):
    """A batch script and a shell of salloc, outside of srun."""
    code, told = _joined_with(variables)
    assert code == 0 and '<0 of 1>' in told, told


def test_processes_that_are_named_need_no_launcher():
    """What the message advises."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        where = f'127.0.0.1:{probe.getsockname()[1]}'
    named = {'JAX_COORDINATOR_ADDRESS': where, 'JAX_NUM_PROCESSES': '1', 'JAX_PROCESS_ID': '0'}
    code, told = _joined_with(_OPEN_MPI_5 | named)
    assert code == 0 and '<0 of 1>' in told, told


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(('127.0.0.1', port)) != 0
