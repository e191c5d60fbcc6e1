#!/usr/bin/env python3
"""Adds one to the number in a file, under a lock that every program of the tenant respects.

usage: lock.py FILE

LEASEHOLD_URL, LEASEHOLD_KEY and LEASEHOLD_TENANT say where the service is, and as whom to ask it.
"""

import json
import os
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid


class Refused(Exception):
    """The service has answered no. `code` says why, for programs."""

    def __init__(self, problem):
        super().__init__(problem.get("detail", "refused"))
        self.code = problem.get("code")
        self.retryable = problem.get("retryable", False)
        self.retry_after = problem.get("retry_after_ms", 1000) / 1000


class Lock:
    """A lock of a tenant, for a `with` statement. It is extended in the background until the block ends."""

    def __init__(self, name, ttl=10.0, patience=60.0):
        base = os.environ["LEASEHOLD_URL"]
        tenant = os.environ["LEASEHOLD_TENANT"]
        # The name is one part of the path: a slash in it is written as %2F.
        self.url = f"{base}/v1/tenants/{tenant}/locks/{urllib.parse.quote(name, safe='')}"
        self.ttl = ttl
        self.patience = patience
        self.lock_id = None
        self.fencing_token = None
        self._trusted_until = 0.0
        self._ended = threading.Event()
        self._renewal = None

    def __enter__(self):
        # Our own id: should an answer get lost, the same request is answered with the same lock.
        self.lock_id = str(uuid.uuid4())
        give_up = time.monotonic() + self.patience
        while True:
            sent = time.monotonic()
            left = max(0.0, give_up - sent)
            try:
                granted = self._ask(
                    "acquire",
                    ttl_ms=int(self.ttl * 1000),
                    wait_ms=int(left * 1000),
                    lock_id=self.lock_id,
                    operation=os.path.basename(sys.argv[0]),
                )
                break
            except Refused as refused:
                if not refused.retryable or time.monotonic() >= give_up:
                    raise
                time.sleep(refused.retry_after)
            except OSError:
                if time.monotonic() >= give_up:
                    raise
                time.sleep(1)
        self.fencing_token = granted["fencing_token"]
        # It may have been granted at any time since it was asked for, or by a request before. Extended, it is known to
        # last: from before the request, whose answer may have been under way for as long as it took.
        sent = time.monotonic()
        self._ask("extend", lock_id=self.lock_id)
        self._trusted_until = sent + self.ttl
        self._renewal = threading.Thread(target=self._renew, daemon=True)
        self._renewal.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._renewal.join()
        self._ask("release", lock_id=self.lock_id)

    def is_held(self):
        """Whether the lock can still be believed in. Ask before each step that cannot be taken back."""
        return time.monotonic() < self._trusted_until

    def _renew(self):
        while not self._ended.wait(self.ttl / 3):
            sent = time.monotonic()
            try:
                self._ask("extend", lock_id=self.lock_id)
                self._trusted_until = sent + self.ttl
            except Refused as refused:
                if not refused.retryable:
                    self._trusted_until = 0.0  # It is over.
                    return
            except OSError:
                pass  # It is tried again, and `is_held` keeps the time.

    def _ask(self, action, **body):
        request = urllib.request.Request(
            f"{self.url}/{action}",
            data=json.dumps(body).encode(),
            method="POST",
            headers={
                "Authorization": f"Bearer {os.environ['LEASEHOLD_KEY']}",
                "Content-Type": "application/json",
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=self.patience + 5) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise Refused(json.load(error)) from None


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    path = sys.argv[1]
    with Lock("examples/counter") as lock:
        with open(path, encoding="utf-8") as file:
            number = int(file.read())
        time.sleep(0.05)  # Work: enough for another to come in between, were it not for the lock.
        if not lock.is_held():
            sys.exit("the lock was lost; nothing was written")
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"{number + 1}\n")
        print(number + 1, lock.fencing_token)


if __name__ == "__main__":
    main()
