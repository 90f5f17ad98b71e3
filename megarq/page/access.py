"""Who may see the web page: hosts and passwords."""

import hmac
import ipaddress
from pathlib import Path

from megarq.errors import ConfigError


class Passwords:
    """The names and passwords of a file: lines of user:password, or one password alone, for any user."""

    def __init__(self, file: Path) -> None:
        """Raises: ConfigError, which tells no password."""
        try:
            lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise ConfigError(f"--password-file {file} is no text in UTF-8. Write it again.") from None
        if not lines:
            raise ConfigError(f"--password-file {file} is empty. Write one password, or lines of user:password.")
        self._password: str | None = None
        self._users: dict[str, str] = {}
        if len(lines) == 1 and ":" not in lines[0]:
            self._password = lines[0]
            return
        for number, line in enumerate(lines, start=1):
            user, colon, password = line.partition(":")
            if not user.strip() or not colon or not password:
                raise ConfigError(f"--password-file {file}: line {number} is not user:password. Correct it.")
            self._users[user.strip()] = password

    def __call__(self, user: str, password: str) -> bool:
        """Whether these may enter."""
        expected = self._users.get(user) if self._password is None else self._password
        return expected is not None and hmac.compare_digest(password.encode(), expected.encode())


def check_host(host: str, password_file: Path | None) -> None:
    """Raise ConfigError for a page that others could reach without a password."""
    try:
        alone = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        alone = False
    if not alone and password_file is None:
        raise ConfigError(
            f"--host {host} can be reached from other machines, and anybody could draw. Give --password-file FILE, or "
            "leave --host out."
        )
