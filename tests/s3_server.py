"""moto's server of S3, in a process of its own."""

import contextlib
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEY_ID, SECRET = "AKIDSQUEEZEWIRE", "wJalrXUtnFEMIsecretBPxRfiCYEXAMPLEKEY"
BUCKET = "bucket"
READY_SECONDS = 60.0


def credentials(endpoint: str, home: Path) -> dict[str, str]:
    """The environment in which S3 is at `endpoint`, and nothing of this machine's own AWS settings holds."""
    return {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(home / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(home / "credentials"),
    }


@contextlib.contextmanager
def serving_s3(log: Path) -> Iterator[str]:
    """The endpoint of an empty S3."""
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            deadline = time.monotonic() + READY_SECONDS
            while not (found := re.search(r"Running on (http://\S+)", log.read_text())):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield found[1]
        finally:
            process.kill()


def upload(endpoint: str, directory: Path, prefix: str) -> None:
    """Put the files of `directory` under s3://bucket/prefix/, alone on the server."""
    with urllib.request.urlopen(f"{endpoint}/moto-api/reset", b"", timeout=READY_SECONDS) as answer:
        assert answer.status == 200
    client: Any = client_of(endpoint)
    client.create_bucket(Bucket=BUCKET)
    for path in sorted(directory.iterdir()):
        if path.is_file():
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{path.name}", Body=path.read_bytes())


def client_of(endpoint: str) -> Any:
    """botocore's client, as whoever owns the bucket uses it."""
    import botocore.session

    return botocore.session.get_session().create_client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=KEY_ID,
        aws_secret_access_key=SECRET,
    )
