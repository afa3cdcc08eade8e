import pytest

from dirotq.pipeline.executor import LocalExecutor


def test_result_and_error_come_through_the_future():
    with LocalExecutor() as executor:
        assert executor.submit(divmod, 7, 2).result() == (3, 1)
        failed = executor.submit(divmod, 7, 0)
    with pytest.raises(ZeroDivisionError):
        failed.result()


def test_ctrl_c_is_not_kept_in_a_future():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LocalExecutor().submit(interrupted)
