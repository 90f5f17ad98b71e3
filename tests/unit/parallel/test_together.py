import errno

import pytest

from megarq.errors import DataError, FaultError, MegarqError
from megarq.parallel.together import together


def fail(error: Exception):
    raise error


def test_results_of_all_ranks_in_order():
    assert together(lambda: "mine", lambda outcome: [("first", None, False), outcome]) == ["first", "mine"]


@pytest.mark.parametrize("error", [DataError("a torn shard"), OSError(28, "No space left on device", "/disk")])
def test_the_rank_that_failed_raises_its_own_error(error):
    with pytest.raises(type(error)) as raised:
        together(lambda: fail(error), lambda outcome: [outcome, ("fine", None, False)])
    assert raised.value is error


@pytest.mark.parametrize(("fault", "kind"), [(False, MegarqError), (True, FaultError)])
def test_the_others_quote_it(fault, kind):
    with pytest.raises(MegarqError, match="rank 1 failed, so this one stops too: a torn shard") as raised:
        together(lambda: "fine", lambda outcome: [outcome, (None, "a torn shard", fault)])
    assert type(raised.value) is kind


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (DataError("mend it"), False),
        (FaultError("try again"), True),
        (OSError(errno.ENOSPC, "full", "/disk"), False),
        (OSError(errno.EIO, "gone", "/disk"), True),
        (OSError(errno.ESHUTDOWN, "evicted", "/lustre"), True),
        (BrokenPipeError(errno.EPIPE, "the launcher is dead"), True),
        (PermissionError(errno.EACCES, "not yours", "/disk"), False),
    ],
)
def test_the_others_learn_whether_a_restart_may_help(error, fault):
    told = []
    with pytest.raises(type(error)):
        together(lambda: fail(error), lambda outcome: [told.append(outcome) or outcome])
    assert told == [(None, str(error), fault)]


def test_a_failure_is_told_before_it_is_raised():
    told = []
    with pytest.raises(DataError):
        together(lambda: fail(DataError("a torn shard")), lambda outcome: [told.append(outcome) or outcome])
    assert told == [(None, "a torn shard", False)]


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        together(lambda: 1 / 0, lambda outcome: [outcome])
