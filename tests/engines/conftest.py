"A port of their own for the trainers of this run: TRL's first choice, 29500, may be another run's"

import os
import socket


def pytest_configure():
    "Before any test: what they start takes the variable along."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        os.environ.setdefault("MASTER_PORT", str(s.getsockname()[1]))
