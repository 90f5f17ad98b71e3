"""What the preflight sees of a GPU; skipped where there is none."""

import pytest
import torch

from megarq.errors import PreflightError
from megarq.launch.fitness import DeviceReport, check_devices
from megarq.parallel.measure import all_reduce_seconds, sum_is_right

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda", 0)


def test_two_ranks_on_one_gpu_are_found_by_its_uuid():
    report = DeviceReport.of(CUDA)
    assert report.failure == "" and report.uuid and 0 < report.free_gib <= report.total_gib

    def gather(value):
        return [value, value]

    with pytest.raises(PreflightError, match=r"one GPU for rank 0 \(node\), rank 1 \(node\): 2 ranks were started"):
        check_devices(report, ["node", "node"], gather)


@pytest.mark.usefixtures("nccl_group")
def test_nccl_sums_known_integers_exactly():
    assert sum_is_right(None, 0, 1, CUDA)
    assert min(all_reduce_seconds(None, 2**20, CUDA)) > 0
