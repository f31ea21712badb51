"""Which names promise a secret: `api_key`, `dbPassword`, `HF_TOKEN`; not `tokenizer`, `key_file`."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_STRONG = _set("password passwords passwd passphrase passphrases secret secrets")
"""Under these even a number is a secret."""
_SECRET = _STRONG | _set(
    """token credential credentials creds authorization auth dsn cookie cookies bearer
    apikey apikeys accesskey secretkey privatekey authtoken accesstoken refreshtoken
    connectionstring connstr"""
)
_KEY_OF = _set(
    """api access private secret signing encryption ssh auth master account shared session deploy service
    license app application client consumer storage hmac aes rsa gpg"""
)
"""`<one of these>_key` is a secret; a bare `key` is a column or the name of a setting."""
_TOKENS_OF = _set("api access auth refresh bearer session secret id")
_PASS_OF = _set("db database smtp user login admin root mysql pg postgres redis http proxy ftp mail email")
_ABOUT = _set(
    """file files path dir folder env var variable command cmd mode type kind name names count counts
    size length len dim dims limit budget rate ratio prob weight weights loss accuracy mask index indices ids
    embedding embeddings enabled required expiry expires ttl timeout sock policy method version"""
)
"""A name that ends so tells about a secret: `key_file`, `token_count`, `RAY_AUTH_MODE`."""


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether what stands under this name is taken for a secret."""
    words = _words(name)
    if not words or words[-1] in _ABOUT:
        return False
    if any(word in _SECRET for word in words):
        return True
    pairs = list(pairwise(words))
    return (
        any(last in ("key", "keys") and first in _KEY_OF for first, last in pairs)
        or any(last == "tokens" and first in _TOKENS_OF for first, last in pairs)
        or any(last in ("pass", "pwd") and first in _PASS_OF for first, last in pairs)
        or ("connection", "string") in pairs
    )


@lru_cache(maxsize=4096)
def is_strong_name(name: str) -> bool:
    """Whether even a number under this name is a secret (a numeric password)."""
    return is_secret_name(name) and any(word in _STRONG for word in _words(name))


@lru_cache(maxsize=4096)
def is_secret_variable(name: str) -> bool:
    """Whether an environment variable of this name holds a secret: any `..._KEY` too."""
    words = _words(name)
    return is_secret_name(name) or (len(words) > 1 and words[-1] in ("key", "pass", "pat", "pwd"))
