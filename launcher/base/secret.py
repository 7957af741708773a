"""Which names and values look like secrets. A guess can miss: `--env` records only the values of PUBLIC names."""

from __future__ import annotations

import re

# Switches of the libraries that a run is made of, whose values belong into its record.
PUBLIC = re.compile(
    r"(NCCL|TORCH|PYTORCH|OMP|KMP|MKL|CUDA|CUBLAS|CUDNN|NVIDIA|NVTE|UCX|GLOO|TP|FI|TRITON|TOKENIZERS|HF_HUB)_\w+"
    r"|LAUNCHER_\w+"
    r"|PYTHON[A-Z]+|HF_DATASETS_\w+|LD_LIBRARY_PATH|LD_PRELOAD|HF_HOME|HOME|TMPDIR|LANG|TZ"
)
# Words, as "_" and "." part them: COMPASS, XAUTHORITY, TOKENIZERS_PARALLELISM and NCCL_IB_PKEY hold none of these.
_NAME = re.compile(
    r"SECRET|PASSWORD|PASSWD|PASSPHRASE|PASSCODE|PASSKEY|AUTHORIZATION|CREDENTIAL"
    r"|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|SIGNING_?KEY|TOKEN(?![A-Z])|(?:API|HF)_?TOKENS"
    r"|(?:PG|DB|SQL|USER|ADMIN|ROOT)(?:PASS|PWD)(?![A-Z])"
    r"|(?<![A-Z])(KEYS?|PASS|PWD|PAT|AUTH|CREDS?|PRIVATE|JWT|BEARER|COOKIE)(?![A-Z])",
    re.IGNORECASE,
)
# Where a secret lies is none (SSH_AUTH_SOCK, HF_TOKEN_PATH), nor are torchtitan's settings of tokens, keys and passes.
_HARMLESS_NAME = re.compile(
    r".*_(FILE|PATH|DIR|SOCK|HEADS|DIM|IDS?|PIPELINE)"
    r"|.*(EOS|BOS|PAD|UNK|VISION|START|END|PER|MASK|SORT|TEXT|CACHE|PRIMARY|FOREIGN)_(TOKEN|KEY)",
    re.IGNORECASE,
)
_HARMLESS_VALUE = re.compile(r"|\d{1,3}(\.\d+)?|true|false|yes|no|on|off|none", re.IGNORECASE)
# Every repetition has a bound: text of others is looked at, and without one the time grows with its square.
_VALUE = re.compile(
    r"(?:^|(?<=/))[^\s/:@]{0,300}:[^\s/]{1,300}(?=@(?!sha256:))"  # user:password@ of an address; not NAME:TAG@sha256:
    r"|(?<=//)[^\s/:@]{1,300}:(?!\d{1,9}/)[^\s@]{1,300}(?=@(?!sha256:))"  # a password with a slash in it
    r"|(?<=//)[^\s/:@]{16,300}(?=@)"  # a token as the user's name
    r"|(?<![\w-])[\w-]{0,40}(?:token|secret|signature|password|passwd|pwd|\bsig|key)=[^\s&;]{6,}"  # signed, or a DSN
    r"|\bpassword [^\s]{6,}|\bBasic [A-Za-z0-9+/=]{8,}"  # of a netrc, of a header
    r"|(?<![\w-])[\w-]{0,40}(?:api-?key|auth-?token|authorization): ?\S+"
    r"|\b(?:hf_|gh[pousr]_)[A-Za-z0-9]{20,}|\b(?:glpat-|sk-)[\w-]{20,}|\bxox[a-z]-[\w-]{10,}|\bgithub_pat_\w{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\beyJ[\w-]{1,2000}+\.[\w-]{1,2000}+\.[\w-]+|\bBearer \S+|AccountKey=\S+|-----BEGIN .*",
    re.IGNORECASE,
)


MOST = 16_000  # characters that are looked at


def looks_secret(name: str, value: object) -> bool:
    """Whether the variable or dotted key `name` with this value should not be in a file, an option or a message."""
    text, word = str(value)[:MOST], name.rpartition(".")[2]
    is_harmless = _HARMLESS_NAME.fullmatch(word) or _HARMLESS_VALUE.fullmatch(text)
    return bool(_VALUE.search(text) or (_NAME.search(word) and not is_harmless))


def masked(text: str) -> str:
    """`text`, cut to MOST, without what gives itself away as a secret, such as the password in an address."""
    return _VALUE.sub("(hidden)", text[:MOST]) + ("…" if len(text) > MOST else "")
