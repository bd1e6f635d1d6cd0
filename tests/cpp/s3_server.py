"""A real S3 server (moto) of one test's own that checks signatures, with faults before it on demand.
usage: s3_server.py PORT BUCKET [ADDRESS]

Prints once it can be used: the access key and secret of a user, then the access key, secret and session token of a role.
`POST /faults/KIND/COUNT` makes the next COUNT requests meet a fault: status503, hang (until the process ends), cut (half of
the answer's body), flip (a byte of it), whole (the range that was asked for is ignored).
"""

from __future__ import annotations

import collections
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

os.environ["INITIAL_NO_AUTH_ACTION_COUNT"] = "0"

from moto.iam.models import iam_backends  # noqa: E402
from moto.s3.models import s3_backends  # noqa: E402
from moto.server import DomainDispatcherApplication, create_backend_app  # noqa: E402
from moto.sts.models import sts_backends  # noqa: E402
from werkzeug.serving import WSGIRequestHandler, make_server  # noqa: E402

ACCOUNT = "123456789012"
POLICY = json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]})
Respond = Callable[..., Any]


class Faults:
    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._due: collections.deque[str] = collections.deque()

    def __call__(self, environ: dict[str, Any], respond: Respond) -> Iterable[bytes]:
        path = environ["PATH_INFO"].split("/")
        if path[1] == "faults":
            self._due.extend([path[2]] * int(path[3]))
            respond("200 OK", [("Content-Length", "0")])
            return [b""]
        try:
            fault = self._due.popleft()
        except IndexError:
            return self._application(environ, respond)
        if fault == "status503":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = b"<Error><Code>SlowDown</Code></Error>"
            respond("503 Slow Down", [("Content-Length", str(len(body)))])
            return [body]
        if fault == "hang":
            threading.Event().wait()
        if fault == "whole":
            environ.pop("HTTP_RANGE", None)
        body = bytearray(b"".join(self._application(environ, respond)))
        if fault == "cut":
            return [bytes(body[: len(body) // 2])]
        if fault == "flip":
            body[len(body) // 3] ^= 1
        return [bytes(body)]


def main(port: int, bucket: str, address: str = "127.0.0.1") -> None:
    iam = iam_backends[ACCOUNT]["aws"]
    iam.create_user("us-east-1", "user")
    iam.put_user_policy("user", "policy", POLICY)
    key = iam.create_access_key("user")
    iam.create_role("role", POLICY, "/", "", "", [], 3600)
    iam.put_role_policy("role", "policy", POLICY)
    role = sts_backends[ACCOUNT]["aws"].assume_role(
        "us-east-1", "session", f"arn:aws:iam::{ACCOUNT}:role/role", None, 3600, None
    )
    s3_backends[ACCOUNT]["aws"].create_bucket(bucket, "us-east-1")

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept

        def log(self, *_: object) -> None:
            pass

    application = DomainDispatcherApplication(create_backend_app)
    server = make_server(address, port, Faults(application), threaded=True, request_handler=Quiet)
    user = (key.access_key_id, key.secret_access_key)
    print(*user, role.access_key_id, role.secret_access_key, role.session_token, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
