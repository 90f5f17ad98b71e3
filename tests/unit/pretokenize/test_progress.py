"""The line that tells how far pre-tokenization is."""

from megarq.data.faults import Fault, Faults
from megarq.pretokenize.progress import Progress


def test_the_line_tells_shards_speed_faults_and_what_is_left() -> None:
    done, faults = [2], Faults(0.5)
    shown = Progress(faults, lambda: done[0], 10, quiet=True)
    assert shown.line(5.0) == "pretokenize: 2/10 shards | here 0 images/s, 0 bad | eta ?"
    for _ in range(3000):
        faults.count_seen()
    faults.skip("a.tar", "k", Fault.NO_IMAGE, "none")
    done[0] = 4
    assert shown.line(60.0) == "pretokenize: 4/10 shards | here 50 images/s, 1 bad | eta 03:00"
