"""Who may see the page."""

import pytest

from megarq.errors import ConfigError
from megarq.page.access import Passwords, check_host


@pytest.fixture
def passwords(tmp_path):
    def read(text):
        file = tmp_path / "passwords"
        file.write_text(text, encoding="utf-8")
        return Passwords(file)

    return read


def test_one_password_is_any_users(passwords):
    enter = passwords("örtlich geheim\n")
    assert enter("ada", "örtlich geheim") and enter("", "örtlich geheim")
    assert not enter("ada", "örtlich") and not enter("ada", "")


def test_a_mark_of_the_order_of_bytes_is_no_part_of_a_password(passwords):
    assert passwords("\ufeffgeheim")("ada", "geheim") and passwords("\ufeffada:geheim")("ada", "geheim")


def test_each_user_has_a_password(passwords):
    enter = passwords("ada:one:two\n\nbob:three\n")
    assert enter("ada", "one:two") and enter("bob", "three")
    assert not enter("ada", "three") and not enter("eve", "three") and not enter("eve", "") and not enter("", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty. Write one password"),
        ("\n \n", "is empty. Write one password"),
        ("ada:secret\nsecret\n", "line 2 is not user:password"),
        ("ada:\n", "line 1 is not user:password"),
        (":secret\n", "line 1 is not user:password"),
    ],
)
def test_a_file_that_lets_nobody_or_anybody_in_is_refused_without_telling_passwords(passwords, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        passwords(text)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "passwords").write_bytes(b"secret\xff")
    with pytest.raises(ConfigError, match="is no text in UTF-8"):
        Passwords(tmp_path / "passwords")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_this_machine_needs_no_password(host):
    check_host(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_what_others_can_reach_needs_a_password(host, tmp_path):
    with pytest.raises(ConfigError, match="can be reached from other machines"):
        check_host(host, None)
    check_host(host, tmp_path / "passwords")
