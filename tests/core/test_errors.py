"""Messages of errors."""

from noisekit.core.errors import UsageError


def test_messages_do_not_act_on_a_terminal() -> None:
    """A name with control characters, as in a file from elsewhere, is shown escaped.

    Catches: an error whose text clears the screen or hides what it says.
    """
    shown = str(UsageError("needs a name, got \x1b[2J\x07."))
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "\\x1b[2J" in shown
