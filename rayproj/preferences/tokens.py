"""Who may rate, and names that tell nothing: raters' tokens, and ids of tasks and images under the study's secret."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from rayproj.errors import UserError
from rayproj.preferences.plan import Turn
from rayproj.storage.store import Store, from_json, to_json

RATERS = "raters"
TOKEN = re.compile(r"(r\d{4,8})-([A-Za-z0-9_\-]{22})")
RATER = re.compile(r"r(\d{4,8})\b")
REFERENCE = "/"  # before the name of a set stands for its photos; no model has such a name
TURN = struct.Struct(">BQ")


def issue(store: Store, count: int) -> list[str]:
    """New tokens, for as many new raters. What is stored are their hashes alone, so nobody can read them again.

    A token is 128 random bits, which no slow hash need protect. Who is to be shut out again loses the file
    raters/<rater>.json; the ratings stay.

    Raises:
        UserError: the number is not positive.
    """
    if count < 1:
        raise UserError(f"--raters={count} must be positive.")
    # After everybody who ever was: whoever got the number of a rater who was shut out would have their ratings too.
    left = [RATER.match(path.split("/")[1]) for folder in (RATERS, "ratings", "checks") for path in store.list(folder)]
    found, number = list[str](), max((int(name[1]) for name in left if name), default=0)
    while len(found) < count:
        number += 1
        rater, secret = f"r{number:04d}", secrets.token_urlsafe(16)
        if store.put_once(f"{RATERS}/{rater}.json", to_json({"sha256": _hash(secret)})):
            found.append(f"{rater}-{secret}")
    return found


def rater_of(store: Store, token: str) -> str | None:
    """The rater whose token this is; None if it is nobody's."""
    match = TOKEN.fullmatch(token)
    if not match:
        return None
    try:
        stored = from_json(store.read(f"{RATERS}/{match[1]}.json"))["sha256"]
    except FileNotFoundError:
        return None
    return match[1] if hmac.compare_digest(stored, _hash(match[2])) else None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class Seal:
    """Ids under a secret of the study.

    That of a task is what a rater is to do, encrypted and authenticated for this rater (AES-SIV, RFC 5297): the
    server reads from it what it stands for, and nobody else can read it, make one, or use another's. The same task
    has the same id at every reload.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._cipher = AESSIV(self._derived("task"))

    @classmethod
    def of(cls, store: Store) -> Seal:
        """That of a study, whose secret is drawn the first time."""
        store.put_once("secret", secrets.token_bytes(32))
        return cls(store.read("secret"))

    def task(self, turn: Turn, rater: str) -> str:
        sealed = self._cipher.encrypt(TURN.pack(turn.check, turn.number), [rater.encode()])
        return base64.urlsafe_b64encode(sealed).decode().rstrip("=")

    def turn(self, task: str, rater: str) -> Turn | None:
        """What an id stands for; None if it is none, or another rater's."""
        try:
            sealed = base64.urlsafe_b64decode(task + "=" * (-len(task) % 4))
            check, number = TURN.unpack(self._cipher.decrypt(sealed, [rater.encode()]))
        except (ValueError, InvalidTag, struct.error):
            return None
        return Turn(bool(check), number)

    def image(self, model: str, prompt: str) -> str:
        """The file of an image, whose name tells nothing; of a reference photo the model is "/<set>"."""
        digest = hmac.new(self._derived("image"), f"{model}/{prompt}".encode(), hashlib.sha256).hexdigest()
        return f"images/{digest[:32]}.png"

    def _derived(self, purpose: str) -> bytes:
        return hmac.new(self._secret, purpose.encode(), hashlib.sha256).digest()
