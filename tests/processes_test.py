"""Worker processes: order, and a job that kills its process."""
import os
import time

from data_pipelines import processes


def work(job: int) -> int:
    if job % 100 == 13:
        os._exit(1)  # pylint: disable=protected-access  # as a decoder that crashes
    time.sleep(0.01 * (job % 3))
    return job * job


def test_results_keep_their_order_and_a_killer_costs_its_own_job_only():
    jobs = [0, 1, 2, 13, 4, 5, 113, 7, 8]
    with processes.Workers(2) as workers:
        found = list(workers.in_order(work, jobs, 4, lambda job: -job))
        assert found == [(job, -job if job % 100 == 13 else job * job) for job in jobs]
        assert list(workers.in_order(work, [3], 4, lambda job: -job)) == [(3, 9)]
