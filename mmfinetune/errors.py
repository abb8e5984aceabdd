"""The one exception type for problems a user can mend."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """A problem the user can mend; shown as one message, exit code 2, no traceback.

    Args:
        message: What is wrong and where (file, key, line or id).
        problems: All problems of that kind, one line each.
        cure: What to do about it.
    """

    max_shown = 50

    def __init__(self, message: str, problems: Iterable[str] = (), cure: str = '') -> None:
        self.message = message
        self.problems = list(problems)
        self.cure = cure
        lines = [message]
        lines += [f'  - {p}' for p in self.problems[:self.max_shown]]
        if len(self.problems) > self.max_shown:
            lines.append(f'  … and {len(self.problems) - self.max_shown} more')
        if cure:
            lines.append(f'How to mend it: {cure}')
        super().__init__('\n'.join(lines))
