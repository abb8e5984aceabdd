"""Say clearly whether this machine can run the pinned set-up. Runs on any Python 3."""

import platform
import sys


def main():
    found = 'Python {}.{} on {} {}'.format(*sys.version_info[:2], platform.system(), platform.machine())
    problems = []
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        problems.append('Python 3.10, 3.11 or 3.12 (name one with: make PYTHON=python3.11 test)')
    if platform.system() != 'Linux':
        problems.append('Linux (on Windows: WSL 2)')
    if platform.machine() != 'x86_64':
        problems.append('an x86-64 processor')
    if problems:
        sys.stderr.write(
            'error: this is {}. The pinned set-up needs {}.\n'
            'Elsewhere install torch, then `pip install -r requirements.txt` without '
            'its pins; that is not tested.\n'.format(found, ', '.join(problems))
        )
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
